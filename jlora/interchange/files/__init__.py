"""The files of an adapter folder in PEFT's format: settings, tensors, and jlora's manifest beside them."""
