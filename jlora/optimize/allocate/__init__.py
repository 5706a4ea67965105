"""Rank allocation: optax transformations that decide, while training, which ranks of which matrix are worth keeping.

A method's rule (`jlora/methods/adalora/rule.py`, ...) decides; `transform` puts it around the optimizer; the other modules
are what rules share.
"""
