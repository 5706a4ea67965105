"""Prompts: what is trained is put in front of a text, not into the weights; one file a method, and what they have in common."""

from jlora.prompts.p_tuning import PTuning as PTuning
from jlora.prompts.prefix_tuning import PrefixTuning as PrefixTuning
from jlora.prompts.prompt_tuning import PromptTuning as PromptTuning

# The classes alone, as in `jlora.methods`.
__all__ = [name for name, value in globals().items() if isinstance(value, type)]  # pyright: ignore[reportUnsupportedDunderAll]
