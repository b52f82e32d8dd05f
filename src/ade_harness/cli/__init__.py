"""The command line: one front door, thin."""
