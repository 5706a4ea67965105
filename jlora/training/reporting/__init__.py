"""What a run says and leaves to be read: progress, metrics, plot and report."""
