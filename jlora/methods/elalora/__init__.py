"""ElaLoRA, and its rule."""

from jlora.methods.elalora.method import ElaLoRA as ElaLoRA
