"""Answers of which it is known which are better: rows of them, and their examples."""
