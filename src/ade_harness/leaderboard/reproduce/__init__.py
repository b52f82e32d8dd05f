"""A run repeated with its own commit, and compared."""
