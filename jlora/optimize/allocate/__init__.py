"""Rank allocation: optax transformations that decide, while training, which ranks of which matrix are worth keeping.

A rule (`adalora`, `elalora`) decides; `transform` puts it around the optimizer; the other modules are what rules share.
"""
