"""What a restart makes of an optimizer's moments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Renewal:
    """How the moments of arrays that begin anew are renewed.

    Attributes:
        prune: share of the entries of each moment that become zero; 1 makes everything as `tx.init` does.
        by: which entries: "random" ones, or those where the first moment is smallest in "magnitude".

    Raises:
        ValueError: for a share outside of 0 to 1, or an unknown choice.
    """

    prune: float = 1.0
    by: str = "random"

    def __post_init__(self) -> None:
        if not isinstance(self.prune, int | float) or not 0 <= self.prune <= 1:
            raise ValueError(f"prune is the share of the moments that become zero, from 0 to 1; got {self.prune!r}")
        if self.by not in ("random", "magnitude"):
            raise ValueError(f'moments are pruned by "random" or by "magnitude", got {self.by!r}')
        object.__setattr__(self, "prune", float(self.prune))
