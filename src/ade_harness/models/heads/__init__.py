"""Heads and pixel decoders."""
