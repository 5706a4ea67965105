"""The adapted product, one file for each form of update."""
