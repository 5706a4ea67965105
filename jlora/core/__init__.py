"""The core: the protocol of methods, adapted products, the walk through a function, the tree, the transforms."""
