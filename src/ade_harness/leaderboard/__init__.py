"""What others published, and how our runs relate to it."""
