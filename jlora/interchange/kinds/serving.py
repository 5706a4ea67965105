"""The profile `serving`: only what vLLM, SGLang and llama.cpp all read correctly."""

from __future__ import annotations

from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.names import Slot
from jlora.interchange.leaves.pieces import Piece, folded

# vLLM's choices of --max-lora-rank; an adapter of any rank up to the chosen one is served.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
KINDS = ("linear", "conv1d_gpt2", "embedding")


def check(form: Form, slots: list[Slot]) -> None:
    """Refuses what a server would ignore or reject.

    Raises:
        ValueError: naming the leaf, the reason, and what to do.
    """
    path, method = form.site.path, form.site.method
    if form.kind != "lora":
        raise ValueError(
            f"{path}: {method} is no low-rank adapter, and servers ignore or reject anything else; pass svd_rank= to turn "
            "its change of the weight into LoRA, or use profile='peft', or serve the merged model (jlora merge)"
        )
    if "m" in form.arrays:
        raise ValueError(f"{path}: servers reject DoRA; pass svd_rank= to turn it into LoRA, or serve the merged model")
    for slot in slots:
        if slot.kind not in KINDS:
            raise ValueError(
                f"{path}: servers read no LoRA of the kind {slot.kind!r}; serve the merged model (jlora merge)"
            )
        if slot.entry.also:
            raise ValueError(
                f"{path} is also {slot.entry.also[0]!r} (tied weights), and servers adapt only one use of the two; leave it "
                "out of the spec, or serve the merged model (jlora merge)"
            )


def pad(pieces: list[Piece]) -> list[Piece]:
    """The pieces padded to one rank, with their scale in `b`.

    Raises:
        ValueError: where a rank is above what any server takes.
    """
    rank = max(piece.rank for piece in pieces)
    if rank > VLLM_RANKS[-1]:
        worst = next(piece for piece in pieces if piece.rank == rank)
        raise ValueError(
            f"{worst.slot.path} has rank {rank}, and servers take up to {VLLM_RANKS[-1]}; pass svd_rank= to lower it"
        )
    return [folded(piece, rank) for piece in pieces]


def advice(rank: int) -> str:
    """The setting that vLLM needs for an adapter of a rank."""
    return f"vLLM needs --max-lora-rank {next(choice for choice in VLLM_RANKS if choice >= rank)} or more"
