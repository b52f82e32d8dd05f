"""Weight files to a network's own parameter names."""
