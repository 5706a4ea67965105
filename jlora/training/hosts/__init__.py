"""The processes and devices of a run: who takes part, what they have in common, and where arrays lie."""
