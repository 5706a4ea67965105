"""What an adapter is and does: explained, counted, measured."""
