"""FourierFT: a few entries of the update's spectrum, trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, integer, number, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype

INITS = ("zero", "normal")
# Above it torch draws its permutation by another rule, and a flat position no longer fits 32 bits soon after.
_MOST = 2**32 // 20


@dataclass(frozen=True)
class FourierFT(Method):
    """Fourier transform fine-tuning: `w + scale * real(ifft2(S))`, with `S [in, out]` zero but for the trained `spectrum`.

    `spectrum [frequencies]` holds the entries of `S` at the flat positions `row * out + column` in `index`, which are
    fixed, drawn from `seed` alone, and the same for all matrices of a shape. Trains `frequencies` values a matrix, whatever
    its size, and the update's rank is not bounded.

    Worth trying where many adapters have to be kept. Every step forms the update by one transform, of about
    `in * out * log(in * out)` operations. Merges, but has no smaller form: servers of LoRA can't take it.

    Args:
        frequencies: entries of the spectrum that are trained (PEFT's `n_frequency`); at most those of the matrix.
        scale: factor of the update. The transform divides by `in * out`, so it is large: PEFT advises 100 to 300.
        seed: the number that the positions are drawn from, by the rule of PEFT, so that equal seeds mean equal positions
            there.
        init: "zero" starts at the base exactly. "normal" draws the spectrum standard normal, as the paper and PEFT do by
            default: the start is not the base's output then.

    Raises:
        ValueError: for a hyperparameter out of range, more frequencies than the matrix has entries, or a matrix of more
            than 2**32 / 20 entries, for which PEFT's positions are drawn in another way.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.FourierFT(200, scale=300.0)})

    Reference:
        Gao et al. 2024, arXiv:2405.03003; formula, positions and "normal" as in PEFT.
    """

    frequencies: int = 1000
    scale: float = 150.0
    seed: int = 777
    init: str = "zero"

    family: ClassVar[str] = "Structured updates"

    # An entry of the update is about `scale * sqrt(frequencies) / (in * out)` times one of the spectrum, which so has to
    # become as large as one: a rate far above LoRA's. No run here chose it.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=3e-2)

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "FOURIERFT",
        tensors=(PeftTensor("fourierft_spectrum", "spectrum"),),
        settings=(
            PeftSetting("n_frequency", "frequencies", 1000, pattern="n_frequency_pattern"),
            PeftSetting("scaling", "scale", 150.0),
            PeftSetting("random_loc_seed", "seed", 777),
        ),
        own_biases="fourier_only",
        fan_in_fan_out=True,
    )

    def __post_init__(self) -> None:
        seed = number(lambda v: isinstance(v, int) and 0 <= v < 2**32, "a whole number of at least 0 and below 2**32")
        bounds = {"frequencies": integer(1), "scale": NOT_ZERO, "seed": seed, "init": one_of(INITS)}
        check_hyperparameters(self, bounds=bounds)

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output."""
        return self.init == "zero"

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Neither axis is one of the matrix's: both arrays lie whole on every device of a mesh."""
        return {"spectrum": ("",), "index": ("",)}

    @property
    def alike(self) -> frozenset[str]:
        """The positions follow from the shape and the seed."""
        return frozenset({"index"})

    def check(self, site: Site) -> None:
        """Refuses a matrix with too few entries, or too many."""
        size = site.in_size * site.out_size
        if self.frequencies > size:
            raise ValueError(
                f"{self.frequencies} frequencies are more than the {size} entries of the {site.in_size} x {site.out_size} "
                "matrix; take fewer"
            )
        if size >= _MOST:
            raise ValueError(
                f"{size} entries are {_MOST} or more, for which PEFT draws in another way; leave the leaf out"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The spectrum by `init`, and the positions."""
        dtype, shape, (rows, columns) = trained_dtype(w), (self.frequencies,), w.shape
        spectrum = jnp.zeros(shape, dtype) if self.init == "zero" else jax.random.normal(key, shape, dtype)
        index = positions(rows, columns, self.frequencies, self.seed)
        return Start({"spectrum": spectrum}, {"index": jnp.asarray(index)})

    def weight(self, view: View) -> jax.Array:
        """`w + scale * real(ifft2(S))`."""
        spectrum, (rows, columns) = view.params["spectrum"], view.w.shape
        row, column = jnp.divmod(view.frozen["index"], jnp.int32(columns))
        # The real part is the transform of the even part of `S`, half of which the real transform takes: it needs half the
        # memory and time, and no complex matrix.
        even, values = jnp.zeros((rows, columns // 2 + 1), spectrum.dtype), spectrum / 2
        even = even.at[row, column].add(values, mode="drop")
        even = even.at[-row % rows, -column % columns].add(values, mode="drop")
        # Flat behind a barrier, since XLA's CPU backend fails where a product would have the transform's result transposed.
        update = jax.lax.optimization_barrier(jnp.fft.irfft2(even, view.w.shape).reshape(-1)).reshape(view.w.shape)
        return view.w.astype(spectrum.dtype) + self.scale * update

    def labels(self, site: Site) -> dict[str, str]:
        """No decay, and the rate of `b`: the spectrum is a vector that starts at zero."""
        return {"spectrum": "vector"}


def positions(rows: int, columns: int, number: int, seed: int) -> np.ndarray:
    """The flat positions `[number]` in a matrix `[rows, columns]` that PEFT trains, in PEFT's order.

    The first entries of torch's `randperm` of the transposed matrix: a shuffle that is ended early, by the numbers of the
    Mersenne twister, which numpy has too.
    """
    size, moved, chosen = rows * columns, dict[int, int](), np.zeros(number, np.int64)
    # The legacy generator, whose numbers numpy promises never to change.
    for here, draw in enumerate(np.random.RandomState(seed).randint(0, 2**32, number, dtype=np.uint32)):
        there = here + int(draw) % (size - here)
        chosen[here], moved[there] = moved.get(there, there), moved.get(here, here)
    return (chosen % rows * columns + chosen // rows).astype(np.int32)


FourierFT.CASES = (FourierFT(20, scale=60.0), FourierFT(31, scale=-20.0, seed=5, init="normal"))
