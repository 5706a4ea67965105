"""What methods that train virtual tokens have in common."""

from __future__ import annotations

import abc
from typing import ClassVar, Self

import jax

from jlora.core.products.extended import Extended
from jlora.core.products.update import Update
from jlora.core.protocol.method import Arrays, Method, Site, View

#: Under this name of `Adapted.context` a call tells which positions are virtual.
VIRTUAL = "virtual"


class Virtual(Method):
    """A method whose leaf does something else for `tokens` virtual tokens in front of a text; see `jlora.prompted`.

    Class attributes:
        own_ids: whether the virtual tokens have ids of their own, beyond the vocabulary.
    """

    tokens: int
    own_ids: ClassVar[bool] = False
    exact_start: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    restarts: ClassVar[bool] = False

    @property
    def encoded(self) -> bool:
        """Whether a network makes what is put in front of the text, which is of no use after training."""
        return False

    @property
    def without_encoder(self) -> Self | Virtual:
        """The method that has what the network makes for its trained array."""
        return self

    def evaluated(self, view: View) -> Arrays:
        """The trained arrays of `without_encoder`: what the network makes of those of this method."""
        return view.params


class VirtualRows(Virtual):
    """Virtual tokens as rows beyond the last one of an embedding."""

    own_ids: ClassVar[bool] = True
    form: ClassVar[type[Update]] = Extended

    @abc.abstractmethod
    def rows(self, view: View) -> jax.Array:
        """The embeddings of the virtual tokens, `[tokens, out]`."""

    def update(self, view: View) -> Extended:
        """The table with the virtual tokens behind its last row."""
        return Extended(self.rows(view), view.site.path)

    def check(self, site: Site) -> None:
        """Refuses a leaf that is known to be multiplied, and not looked up."""
        if site.kind not in ("gather", "dot"):
            raise ValueError("virtual tokens are rows of an embedding, and this leaf is the kernel of a convolution")
