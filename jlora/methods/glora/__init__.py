"""GLoRA, and the search for its configuration."""

from jlora.methods.glora.method import GLoRA as GLoRA
