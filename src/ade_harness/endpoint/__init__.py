"""Models behind HTTP: the client, and a reference server."""
