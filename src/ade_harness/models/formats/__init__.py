"""Models that come as a file or object of some library."""
