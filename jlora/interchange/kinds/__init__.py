"""The kinds of adapter that both PEFT and jlora have, a file or two each; `formats` has them all."""
