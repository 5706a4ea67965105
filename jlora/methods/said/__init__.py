"""SAID, and the Fastfood map that it spreads its values by."""

from jlora.methods.said.method import SAID as SAID
