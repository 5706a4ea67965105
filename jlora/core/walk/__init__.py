"""How a weight travels through the equations of a lifted function."""
