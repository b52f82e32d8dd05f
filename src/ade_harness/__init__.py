"""Exact, distributed evaluation of ADE20K scene parsing."""

__version__ = "0.1.0"
