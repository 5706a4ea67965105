"""What a method is, and what families of methods have in common."""
