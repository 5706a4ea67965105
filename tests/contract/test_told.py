"""The contract for methods that a call tells something, and for those that say something."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from contract import checks, discovery
from contract.acting import Network
from jlora.compose.mixtures.meteora import MeteoRA
from jlora.compose.mixtures.xlora import XLoRA
from jlora.compose.slotted import Slotted
from jlora.methods import Poly

CHECKS = discovery.checks(checks)
# What the core does with what is told and said.
FIRST = {"check_lift", "check_mesh"}
OTHERS = FIRST | {"check_agree", "check_dtype"}


@dataclass(frozen=True)
class Chosen(Slotted):
    """One slot for all. Trains `slots * (rank * (in + out) + (out if gains else 0))` values."""

    slots: int = 3
    rank: int = 2
    told: ClassVar[dict] = {"slot": 2}


@dataclass(frozen=True)
class Mixed(Slotted):
    """A mix of all slots. Trains `slots * rank * (in + out)` values."""

    slots: int = 3
    rank: int = 2
    told: ClassVar[dict] = {"weights": [0.3, 1.5, -0.5]}


@dataclass(frozen=True)
class OneTask(Poly):
    """The second of three tasks. Trains `skills * rank * (in + out) + tasks * splits * skills` values."""

    rank: int = 2
    tasks: int = 3
    skills: int = 2
    told: ClassVar[dict] = {"task": 1}


@dataclass(frozen=True)
class Scaled(XLoRA):
    """Adapters mixed by numbers.

    Trains `len(names) * rank * (in + out)` values. Shares `len(names) * (width + 1)` trained values.
    """

    rank: int = 2
    train_adapters: bool = True
    told: ClassVar[dict] = {"scalings": [[0.3, 1.5]]}


@dataclass(frozen=True)
class Louder(Network):
    """A network beside the product that a call scales, and that says its output.

    Trains `rank * (2 * in if side == "input" else 2 * out if side == "output" else in + out)` values.
    """

    context: ClassVar[frozenset[str]] = frozenset({"volume"})
    told: ClassVar[dict] = {"volume": 1.5}

    def apply(self, x, product, view):
        y, base = super().apply(x, product, view), product(x)
        change = (y - base) * view.context["volume"].astype(y.dtype)
        return base + change, {"change": change}


# Methods that tell a form whole.
WHOLE = (Chosen(), MeteoRA.CASES[0])

CASES = [
    pytest.param(method, check, id=f"{method}-{check}", marks=() if quick and check in FIRST else pytest.mark.long)
    for method, quick in (
        (Chosen(), True),
        (Chosen(gains=True), False),
        (Mixed(), False),
        (OneTask(), False),
        (Scaled(), False),
        *((case, case == MeteoRA.CASES[0]) for case in MeteoRA.CASES),
        (Louder(), True),
    )
    for check in (CHECKS if method in WHOLE else OTHERS)
]


@pytest.mark.parametrize(("method", "check"), CASES)
def test_a_method_that_is_told_or_says_something_keeps_the_contract(method, check):
    CHECKS[check](method)
