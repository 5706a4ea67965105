"""Which torch parameter a leaf is: an entry of the tables that a person writes."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("linear", "conv1d_gpt2", "conv", "embedding", "experts", "experts_in_out", "parameter", "plain")


@dataclass(frozen=True)
class TorchParameter:
    """Where a leaf lives on the torch side, and what its own axes are.

    Args:
        name: name of the torch parameter as in `state_dict()`, such as `"model.layers.{layer}.mlp.up_proj.weight"`. Braces
            hold a group of the table's regex, or an axis of the leaf that `roles` names: a stack is split along it. Several
            names for a leaf that holds several parameters (fused q, k and v), in their order.
        roles: one word for each axis of the leaf: "in", "out", the name of a stacked axis, "expert" for the experts of a
            3-D parameter, or "part" for an axis that counts the names. Default: the axes in braces, then "in out".
        kind: how torch keeps the matrix.
            "linear": `[out, in]`.
            "conv1d_gpt2": `[in, out]` (transformers' Conv1D in GPT-2).
            "conv": `[out, in, *window]`; the leaf is `[*window, in, out]`, all but the last with the role "in".
            "embedding": `[rows, features]`.
            "experts": one parameter `[experts, out, in]`; "experts_in_out": `[experts, in, out]`.
            "parameter": `[out, in]`, of a module that is no Linear, such as the router of experts: PEFT adapts it by
            `target_parameters`, as it does experts.
            "plain": as the leaf: norms, biases, anything.
        sizes: columns of each name, where several names divide the folded "out" axes one after the other.
        columns: `(start, stop, width)`, where the leaf is only these columns of a parameter that has `width` of them (q
            of a fused q, k and v).
        also: names of parameters that are the same array (tied weights), as in a head that is the embedding.
        factor: by what the model multiplies the rows that it looks up in an "embedding", as Gemma does. Virtual tokens in
            PEFT's folders stand behind that, those of jlora before it.
        position: place among the parameters of its module as the module defines them; needed where a module has several
            3-D parameters, whose tensors PEFT nests in that order.

    Raises:
        ValueError: for a kind, role or combination that has no meaning.

    Example:
        >>> q_or_v = jlora.TorchParameter("h.{layer}.attn.{p}.weight", "layer in out")
        >>> names = {r"layers/attention/(?P<p>[qv])/kernel": q_or_v}
    """

    name: str | tuple[str, ...]
    roles: str | None = None
    kind: str = "linear"
    sizes: tuple[int, ...] | None = None
    columns: tuple[int, int, int] | None = None
    also: tuple[str, ...] = ()
    factor: float = 1.0
    position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        words = [] if self.roles is None else self.roles.split()
        if self.roles is not None and self.kind != "plain" and not {"in", "out"} <= set(words):
            raise ValueError(f'roles of a {self.kind} name "in" and "out" among the axes; got {self.roles!r}')
        several = len(self.names) > 1
        if several != (self.sizes is not None or words.count("part") == 1):
            raise ValueError(
                f"{self.names}: several names need sizes, or one axis with the role 'part', and one has none"
            )
        if self.sizes is not None and len(self.sizes) != len(self.names):
            raise ValueError(f"sizes {self.sizes} are not one for each of the names {self.names}")
        if self.columns is not None and (several or not 0 <= self.columns[0] < self.columns[1] <= self.columns[2]):
            raise ValueError(f"columns are (start, stop, width) of one parameter; got {self.columns} for {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names as a tuple."""
        return (self.name,) if isinstance(self.name, str) else tuple(self.name)
