"""Prompt tuning: the embeddings of virtual tokens in front of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Site, Start, View
from jlora.methods.lora import trained_dtype
from jlora.prompts.virtual import VirtualRows

INITS = ("vocabulary", "uniform", "text", "classes")
# The paper draws from the commonest tokens, which have the lowest numbers.
COMMON = 5000


@dataclass(frozen=True)
class PromptTuning(VirtualRows):
    """Trains the embeddings `prompt [tokens, out]` of virtual tokens that stand in front of every text.

    Goes to the embedding that tokens are looked up in; `jlora.prompted` puts the virtual tokens in front of a function's
    input. The model and its vocabulary stay as they are. Trains `tokens * out` values a matrix.

    The fewest values of all methods, and one model can serve many prompts; needs more steps and higher learning rates than
    LoRA, and works worse on small models.

    Args:
        tokens: how many virtual tokens.
        init: what they start from. "vocabulary": rows of different tokens, drawn from the first 5,000. "uniform": uniform in
            ±0.5. "text": the rows of the tokens `text`, from the beginning again where they are fewer than `tokens`, and cut
            where they are more: then the start is what the text does as a prompt. "classes": for each entry of `classes` the
            mean of its tokens' rows; "vocabulary" for the others.
        text: ids of the tokens of a text, for "text".
        classes: for each class the ids of its name's tokens, for "classes".

    Raises:
        ValueError: for a hyperparameter out of range, `text` or `classes` that the start does not use, or misses, and ids that
            are no rows of the embedding.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> adapted = jlora.adapterize(params, {"embed_tokens/embedding": jlora.PromptTuning(tokens=20)})

    Reference:
        Lester et al. 2021, arXiv:2104.08691; "text" as in PEFT, "classes" as in the authors' code.
    """

    tokens: int = 20
    init: str = "vocabulary"
    text: tuple[int, ...] = ()
    classes: tuple[tuple[int, ...], ...] = ()

    family: ClassVar[str] = "Prompts"
    # Not chosen by a sweep. The paper's 0.3 is for Adafactor.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=3e-2, targets="embedding")

    def __post_init__(self) -> None:
        check_hyperparameters(self, bounds={"tokens": integer(1), "init": one_of(INITS)})
        for name in ("text", "classes"):
            if bool(getattr(self, name)) != (self.init == name):
                raise ValueError(f'PromptTuning\'s {name} must be given with init="{name}", and only then')
        if len(self.classes) > self.tokens or not all(self.classes):
            raise ValueError(
                f"PromptTuning's classes must be at most {self.tokens} (tokens) lists of ids, none of them empty, got "
                f"{self.classes}"
            )

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"prompt": ("", "out")}

    def check(self, site: Site) -> None:
        """Refuses ids that are no rows of the embedding."""
        super().check(site)
        ids = [*self.text, *(each for name in self.classes for each in name)]
        if any(not 0 <= each < site.in_size for each in ids):
            raise ValueError(f"ids of text and classes must be from 0 to {site.in_size - 1}, got {ids}")

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The embeddings by `init`."""
        return Start({"prompt": self._drawn(key, w).astype(trained_dtype(w))})

    def _drawn(self, key: jax.Array, w: jax.Array) -> jax.Array:
        if self.init == "uniform":
            return jax.random.uniform(key, (self.tokens, w.shape[1]), trained_dtype(w), -0.5, 0.5)
        if self.init == "text":
            return w[jnp.resize(jnp.array(self.text), (self.tokens,))]
        common = min(COMMON, w.shape[0])
        drawn = w[jax.random.choice(key, common, (self.tokens,), replace=self.tokens > common)]
        if not self.classes:
            return drawn
        means = jnp.stack([jnp.mean(w[jnp.array(name)].astype(jnp.float32), axis=0) for name in self.classes])
        return drawn.astype(means.dtype).at[: len(self.classes)].set(means)

    def rows(self, view: View) -> jax.Array:
        """`prompt`."""
        return view.params["prompt"]


PromptTuning.CASES = (
    PromptTuning(tokens=3),
    PromptTuning(tokens=2, init="uniform"),
    PromptTuning(tokens=5, init="text", text=(1, 4)),
    PromptTuning(tokens=2, init="classes", classes=((1, 2),)),
)
