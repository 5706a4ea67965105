"""Codes: the forms in which base leaves can be kept, a file each."""
