"""Backbones that no library has as the official code computes them."""
