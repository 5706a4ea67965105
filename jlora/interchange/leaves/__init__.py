"""Which torch parameters a leaf is, and how its arrays lie there."""
