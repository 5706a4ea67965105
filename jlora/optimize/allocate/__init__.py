"""Rank allocation: optax transformations that decide, while training, which ranks of which matrix are worth keeping.

A method's rule (`adalora`, `alora`, `beamlora`, `elalora`, `sora`) decides, and `transform` puts it around the optimizer.
`prilora` and `rmlora` are rules that allocate no ranks. The other modules are what rules share, and what reads their results.
A *module* is here one adapted matrix: a leaf, or a matrix of a stacked leaf.
"""
