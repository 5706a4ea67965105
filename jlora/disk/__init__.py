"""Adapters and methods on disk, and files that may be damaged."""
