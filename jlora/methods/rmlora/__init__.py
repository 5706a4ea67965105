"""RMLoRA, and its rule."""

from jlora.methods.rmlora.method import RMLoRA as RMLoRA
