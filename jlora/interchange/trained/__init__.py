"""What is trained itself and has no adapter: whole leaves, and rows of embeddings."""
