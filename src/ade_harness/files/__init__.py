"""Files from elsewhere and onto disk; no knowledge of what is in them."""
