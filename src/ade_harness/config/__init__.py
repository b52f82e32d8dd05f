"""What to run: typed, composed by Hydra, validated."""
