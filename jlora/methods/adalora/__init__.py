"""AdaLoRA, and its rule."""

from jlora.methods.adalora.method import AdaLoRA as AdaLoRA
