"""ALoRA, and its rule."""

from jlora.methods.alora.method import ALoRA as ALoRA
