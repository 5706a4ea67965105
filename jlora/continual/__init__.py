"""Continual learning: what happens between two tasks, or when a loss stands still, and what is counted."""
