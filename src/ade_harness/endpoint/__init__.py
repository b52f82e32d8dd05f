"""Models behind HTTP: the client, and a server."""
