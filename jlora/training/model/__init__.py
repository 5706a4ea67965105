"""What a run trains: the model as a function, which weights are adapted and from where they start, and one step of it."""
