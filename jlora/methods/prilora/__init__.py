"""PRILoRA, and its rule."""

from jlora.methods.prilora.method import PRILoRA as PRILoRA
