"""What a run is told: its settings, the flags and the file that set them, and what is chosen where they say nothing."""
