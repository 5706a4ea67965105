"""Data larger than memory: rows that stay in their files, and examples in a file of their own."""
