"""A params tree with its adapters: which leaves, how they start, where they lie."""
