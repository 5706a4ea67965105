"""OFT, and the rule of its constrained variant."""

from jlora.methods.oft.method import OFT as OFT
