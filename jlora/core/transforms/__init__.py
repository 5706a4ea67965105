"""Transforms of functions: `lift`, `sites`, `observe`."""
