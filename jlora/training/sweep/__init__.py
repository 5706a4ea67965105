"""Many runs at once: their grid, their training on one base pass, and the page that compares them."""
