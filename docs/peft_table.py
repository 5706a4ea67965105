"""The tables of docs/peft.md, made from the code: what is tried is what is told."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp

import jlora
from jlora.core.tree.starts import blank
from jlora.disk import catalog
from jlora.interchange.files import config
from jlora.models.torch_parameter import KINDS, TorchParameter

PAGE = Path(__file__).parent / "peft.md"
NAMES = {"layers_0/up/kernel": "layers.0.up", "embed/embedding": TorchParameter("embed.weight", "in out", "embedding")}
HEADS = {"k": "layers.0.k_proj.weight", "v": "layers.0.v_proj.weight"}


@functools.cache
def attempt(method: jlora.Method, profile: str) -> str:
    """What becomes of a method in a profile, by trying it on a small matrix."""
    rows = isinstance(method, jlora.Rows | jlora.PromptTuning | jlora.PTuning)
    leaf = "embed/embedding" if rows else "layers_0/up/kernel"
    params = {"layers_0": {"up": {"kernel": jnp.cos(jnp.arange(480.0)).reshape(24, 20)}}}
    params["embed"] = {"embedding": jnp.sin(jnp.arange(120.0)).reshape(12, 10)}
    spec = {leaf: jlora.Axes("in out", method, "gather") if leaf.startswith("embed") else method}
    if isinstance(method, jlora.PrefixTuning):  # keys and values of every layer, or none
        params, spec = {"k": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}, {"[kv]": method}
    adapted = jlora.adapterize(params, spec, prepared=blank(params, spec))
    with tempfile.TemporaryDirectory() as folder:
        try:
            jlora.save_peft(
                Path(folder) / "out", adapted, HEADS if "k" in params else NAMES, profile, prefix=jlora.PrefixLayout(4)
            )
        except ValueError as error:
            return "by `svd_rank=`" if "svd_rank=" in str(error) else "no"
        told = json.loads((Path(folder) / "out" / "adapter_config.json").read_text())
    return _told(told)


def _told(told: dict) -> str:
    if told.get("trainable_token_indices"):
        return "`trainable_token_indices`"
    if told.get("modules_to_save"):
        return "`modules_to_save`, or `bias`"
    kind = f"`{told['peft_type']}`" + (f" of rank {told['r']}" if told["peft_type"] == "LORA" else "")
    return kind + (", `use_dora`" if told.get("use_dora") else "")


def _case(cls: type[jlora.Method]) -> list[jlora.Method]:
    """The first case; of LoRA those that start from the weight too, of SHiRA one with as many entries as PEFT takes."""
    if cls is jlora.LoRA:
        return [jlora.LoRA(rank=4), jlora.LoRA(rank=4, init="olora"), jlora.LoRA(rank=4, init="pissa")]
    if cls is jlora.SHiRA:
        return [jlora.SHiRA("weight", rank=1), jlora.SHiRA("weight", density=0.25)]
    return [cls.CASES[0]]


def methods_rows() -> list[str]:
    """One row a method."""
    lines = ["| in jlora | profile `peft` | profile `serving` |", "|---|---|---|"]
    for cls in catalog.methods().values():
        for case in _case(cls):
            lines.append(f"| `{case}` | {attempt(case, 'peft')} | {attempt(case, 'serving')} |")
    return lines


def settings_rows() -> list[str]:
    """One row for each of PEFT's settings that says what the tensors are, or that is refused."""
    lines = ["| setting of PEFT | in jlora |", "|---|---|"]
    lines += [f"| `{key}` | {text} |" for key, text in config.USED.items()]
    lines += [f"| `{key}` | refused: {text} |" for key, text in config.REFUSED.items()]
    edited = ", ".join(f'`"{name}"`' for name in config.EDITED_BASE)
    return [*lines, f"| `init_lora_weights` of {edited} | refused: the base was edited |"]


def kinds_rows() -> list[str]:
    """One row for each way in which torch keeps a matrix."""
    lines = ["| `kind` | torch keeps |", "|---|---|"]
    text = " ".join((TorchParameter.__doc__ or "").split())
    for kind in KINDS:
        told = text.split(f'"{kind}": ')[1].split(". ")[0].split("; ")[0]
        lines.append(f"| `{kind}` | {told.rstrip('.')} |")
    return lines


#: The tables by the marks of the page between which they stand.
TABLES = {"methods": methods_rows, "settings": settings_rows, "kinds": kinds_rows}
