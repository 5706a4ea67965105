"""What training needs beside gradients: optimizers, events, restarts, rank allocation."""
