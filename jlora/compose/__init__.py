"""Adapters put together, taken apart and turned into other forms."""
