"""Trained adapters side by side, and what learns which of them a token or a prompt needs."""
