"""Damages PEFT folders at random, and counts what `jlora.load_peft` says.

Right is one of two outcomes. Either the folder is refused: a ValueError or FileNotFoundError of one line that names the file
that is damaged, or another file of the folder that it contradicts. Or it loads; where jlora's manifest lies beside it, the
adapters that are loaded then give the weights that were saved. Anything else is a fault, and is printed with its seed.

    python experiments/damaged_files/peft_folders.py --count 2000 --seed 0
"""

import argparse
import collections
import contextlib
import json
import random
import shutil
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import TorchParameter

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "jlora_manifest.json"
LORA = jlora.LoRA(rank=2, alpha=3, init="random")
STACK = jlora.Axes("batch in out", LORA)


def filled(*shape: int) -> jax.Array:
    return jnp.cos(jnp.arange(float(np.prod(shape))) * 3 + len(shape)).reshape(shape)


PARAMS = {
    "up": {"kernel": filled(6, 5), "bias": filled(5)},
    "down": {"kernel": filled(5, 6)},
    "q": {"kernel": filled(6, 4)},
    "k": {"kernel": filled(6, 4)},
    "layers": {"kernel": filled(2, 6, 6)},
    "embed": {"embedding": filled(7, 6)},
    "conv": {"kernel": filled(3, 2, 4)},
    "experts": {"up": filled(2, 4, 3)},
}
NAMES = {
    "(?P<m>up|down)/(kernel|bias)": "{m}",
    "q/kernel": TorchParameter("qk.weight", "in out", columns=(0, 4, 8)),
    "k/kernel": TorchParameter("qk.weight", "in out", columns=(4, 8, 8)),
    "layers/kernel": TorchParameter("h.{layer}.mlp.weight", "layer in out"),
    "embed/embedding": TorchParameter("embed.weight", "in out", "embedding"),
    "conv/kernel": TorchParameter("conv.weight", "in in out", "conv"),
    "experts/up": TorchParameter("experts.up_proj", "expert in out", "experts"),
}
SPECS = {
    "lora": {"(up|down|q|k)/kernel": LORA, "up/bias": jlora.Full(), "layers/kernel": STACK},
    "rslora": {"up/kernel": jlora.LoRA(2, 3.0, "rslora", init="random"), "down/kernel": jlora.LoRA(3, 3.0, "rslora")},
    "dora": {"up/kernel": jlora.DoRA(LORA), "layers/kernel": jlora.Axes("batch in out", jlora.DoRA(LORA))},
    "pissa": {"up/kernel": jlora.LoRA(2, 3.0, init="pissa")},
    "others": {
        "conv/kernel": jlora.Axes("in in out", LORA, "conv"),
        "experts/up": STACK,
        "embed/embedding": jlora.Axes("in out", jlora.Rows((1, 3)), "gather"),
    },
    "full": {"up/kernel": LORA, "down/kernel": jlora.Full()},
    "adalora": {"(up|down)/kernel": jlora.AdaLoRA(rank=3, target=2, alpha=4, steps=10)},
    "vera": {"(up|down)/kernel": jlora.VeRA(rank=3)},
    "shira": {"(up|down)/kernel": jlora.SHiRA("weight", rank=1)},
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, 1e39, 10**400, float("nan"), float("inf"), "", "x", "LORA", "\n\ud83d", [], [1], [[]],
    ["x"], [None], {}, {"x": 1}, {"up": None}, {"(": 1}, {"up": 3}, {"(a+)+b": 2},
)  # fmt: skip


class Folders:
    """Whole folders to be damaged, each with the weights that it stands for.

    Args:
        directory: where they are written.
    """

    def __init__(self, directory: Path):
        self.merged, self.paths = {}, {}
        for name, spec in SPECS.items():
            adapted = jlora.adapterize(PARAMS, spec)
            moved = jax.tree.map(lambda x: x + jnp.sin(jnp.arange(x.size)).reshape(x.shape) / 5, adapted.params)
            adapted = adapted.replace(params=moved)
            self.paths[name] = directory / name
            jlora.save_peft(self.paths[name], adapted, NAMES)
            self.merged[name] = jax.tree.map(np.asarray, jlora.merge(adapted))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in inside]
    return found + [place for _, each in list(inside) for place in places(each)]


def damage_json(text: str, draw: random.Random) -> str:
    """JSON with one value replaced, dropped, doubled, added or nested."""
    tree = json.loads(text)
    container, key = draw.choice(places(tree))
    kind = draw.choice(["replace"] * 6 + ["drop", "double", "add", "nest", "all"])
    if kind == "drop":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        container[draw.choice(["new_setting", "layer_replication", "ranks", "lora_bias", "use_qalora"])] = draw.choice(
            VALUES
        )
    elif kind == "nest":
        container[key] = "@"
        depth = draw.choice([40, 400, 900, 100_000])
        return json.dumps(tree).replace('"@"', "[" * depth + "]" * depth)
    elif kind == "double" and isinstance(container, dict):
        marked = json.dumps(tree).replace(f'"{key}":', f'"{key}": {json.dumps(draw.choice(VALUES))}, "{key}":', 1)
        return marked
    elif kind == "all":
        return json.dumps(draw.choice(VALUES))
    else:
        container[key] = draw.choice(VALUES)
    return json.dumps(tree)


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut off, added or overwritten."""
    kind, at = draw.choice(["flip", "flip", "cut", "add", "zero"]), draw.randrange(len(data))
    if kind == "cut":
        return data[:at]
    if kind == "add":
        return data + draw.randbytes(draw.choice([1, 100]))
    if kind == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 3])):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def damage_tensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header lies, or with a value that is no number."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length].decode(), bytearray(data[8 + length :])
    if draw.random() < 0.3:
        at = draw.randrange(len(body) // 4) * 4
        body[at : at + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf"), -float("inf")]))
    else:
        header = damage_json(header, draw)
    encoded = header.encode(errors="replace")
    return struct.pack("<Q", draw.choice([len(encoded)] * 9 + [2**63])) + encoded + bytes(body)


def damage(folder: Path, draw: random.Random) -> str:
    """Damages one file of a folder; returns its name."""
    if draw.random() < 0.3:
        (folder / MANIFEST).unlink()
    name = draw.choice([file.name for file in sorted(folder.iterdir())])
    path = folder / name
    if draw.random() < 0.3:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
    elif name == TENSORS:
        path.write_bytes(damage_tensors(path.read_bytes(), draw))
    else:
        path.write_text(damage_json(path.read_text(), draw), errors="surrogatepass")
    if draw.random() < 0.02:
        path.unlink()
    return name


def verdict(folder: Path, damaged: str, merged: Any) -> tuple[str, str]:
    """What came of a damaged folder, and what to know of it where that is a fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = jlora.load_peft(folder, PARAMS, NAMES)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        named = str(folder) in text and (damaged in text or any(name in text for name in (CONFIG, TENSORS, MANIFEST)))
        if not named or "\n" in text or len(text) > 2000:
            return "fault: a bad message", text[:500]
        return f"refused for {damaged}", ""
    except Exception as error:  # every other kind is a fault
        return f"fault: {type(error).__name__}", str(error)[:500]
    if not (folder / MANIFEST).exists():
        return f"read with {damaged}, and no manifest", ""
    now = jax.tree.map(np.asarray, jlora.merge(adapted))
    if all(np.allclose(a, b, atol=1e-4) for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(merged), strict=True)):
        return f"read with {damaged}, equal", ""
    return "fault: other weights", damaged


def run(count: int, seed: int, directory: Path) -> tuple[collections.Counter[str], list[str]]:
    """Damages `count` folders and counts the outcomes.

    Args:
        count: how many.
        seed: of the first; folder n has the seed `seed + n`.
        directory: an empty folder to work in.

    Returns:
        The number of each outcome, and a line for each fault.
    """
    whole = Folders(directory / "whole")
    outcomes: collections.Counter[str] = collections.Counter()
    faults = []
    for n in range(seed, seed + count):
        draw = random.Random(n)
        name = draw.choice(sorted(SPECS))
        folder = directory / "damaged"
        shutil.copytree(whole.paths[name], folder)
        outcome, detail = verdict(folder, damage(folder, draw), whole.merged[name])
        outcomes[outcome] += 1
        if outcome.startswith("fault"):
            faults.append(f"seed {n}, {name}: {outcome}: {detail}")
        shutil.rmtree(folder)
    return outcomes, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="folders to damage (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first (0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(KeyboardInterrupt):
        outcomes, faults = run(options.count, options.seed, Path(directory))
        for outcome, number in sorted(outcomes.items()):
            print(f"{number:6}  {outcome}")
        print(*faults, sep="\n")


if __name__ == "__main__":
    main()
