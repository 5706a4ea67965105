"""LoRA-FA, and its rule."""

from jlora.methods.lorafa.method import LoRAFA as LoRAFA
