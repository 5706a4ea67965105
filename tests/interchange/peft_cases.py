"""The toy models of `tests/golden/make_peft_adapters.py` as JAX functions, with their names."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import TorchParameter

FOLDER = Path(__file__).parents[1] / "golden" / "peft_adapters"


def text(p, tokens):
    x = jnp.tanh(jnp.take(p["embed"]["embedding"], tokens, axis=0) @ p["up"]["kernel"] + p["up"]["bias"])
    x = x @ p["mix"]["kernel"] + p["mix"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * p["norm"]["scale"] + p["norm"]["bias"]
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def image(p, x):
    dimensions = ("NCHW", "HWIO", "NCHW")
    y = lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=dimensions)
    return y + p["conv"]["bias"][:, None, None]


def sound(p, x):
    y = lax.conv_general_dilated(x, p["conv"]["kernel"], (1,), "VALID", dimension_numbers=("NCH", "HIO", "NCH"))
    return y + p["conv"]["bias"][:, None]


def gpt(p, x):
    """GPT-2's attention input with q, k and v apart."""
    q, k, v = (x @ p[name]["kernel"] + p[name]["bias"] for name in "qkv")
    return jnp.tanh(q) * k + v


def mixture(p, x):
    """Experts with gate and value apart."""
    gate, value = (jnp.einsum("ni,eio->eno", x, p[name]) for name in ("gate", "value"))
    return jnp.einsum("eni,eio->eno", jnp.tanh(gate) * value, p["down"]).sum(0)


def dense(path):
    """The names of an ordinary tree."""
    module, _, last = path.rpartition("/")
    return f"{module}.bias" if last == "bias" else f"{module}.weight"


CONV = {
    "conv/kernel": TorchParameter("conv.weight", "in in in out", "conv"),
    "conv/bias": "conv.bias",
}
CONV1D = {**CONV, "conv/kernel": TorchParameter("conv.weight", "in in out", "conv")}
GPT = {
    f"{name}/{end}": TorchParameter(f"c_attn.{last}", roles, kind, columns=(4 * n, 4 * n + 4, 12))
    for n, name in enumerate("qkv")
    for end, last, roles, kind in (("kernel", "weight", "in out", "conv1d_gpt2"), ("bias", "bias", "out", "plain"))
}


def experts(kind):
    up, down = "experts.gate_up_proj", "experts.down_proj"
    return {
        "gate": TorchParameter(up, "expert in out", kind, columns=(0, 5, 10), position=0),
        "value": TorchParameter(up, "expert in out", kind, columns=(5, 10, 10), position=0),
        "down": TorchParameter(down, "expert in out", kind, position=1),
    }


MODELS = {"conv2d": (image, CONV), "conv2d_dora": (image, CONV), "conv1d": (sound, CONV1D), "gpt2": (gpt, GPT)}
MODELS |= {"experts": (mixture, experts("experts")), "experts_transposed": (mixture, experts("experts_in_out"))}


def model_of(case):
    return MODELS.get(case, (text, dense))


def params_of(case, base):
    """The base of a case in JAX's layout."""
    arrays = {name.removeprefix("base/"): value for name, value in base.items() if name.startswith("base/")}
    if case in ("conv2d", "conv2d_dora", "conv1d"):
        kernel = arrays["conv.weight"].transpose(*range(2, arrays["conv.weight"].ndim), 1, 0)
        return {"conv": {"kernel": kernel, "bias": arrays["conv.bias"]}}
    if case == "gpt2":
        kernels, biases = np.split(arrays["c_attn.weight"], 3, 1), np.split(arrays["c_attn.bias"], 3)
        return {name: {"kernel": k, "bias": b} for name, k, b in zip("qkv", kernels, biases)}
    if case.startswith("experts"):
        axes = (0, 1, 2) if case.endswith("transposed") else (0, 2, 1)
        up, down = (arrays[f"experts.{name}"].transpose(axes) for name in ("gate_up_proj", "down_proj"))
        return {"gate": up[..., :5], "value": up[..., 5:], "down": down}
    params = {
        name: {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]} for name in ("up", "mix", "head")
    }
    params["norm"] = {"scale": arrays["norm.weight"], "bias": arrays["norm.bias"]}
    return {**params, "embed": {"embedding": arrays["embed.weight"]}}


def cases():
    return sorted(folder.name for folder in FOLDER.iterdir())


def load_case(case):
    """Function, params, names, input and output of a case."""
    with np.load(FOLDER / case / "case.npz") as file:
        stored = dict(file)
    function, names = model_of(case)
    params = params_of(case, stored)
    return function, jax_tree(params), names, jnp.asarray(stored["x"]), stored["y"]


def jax_tree(tree):
    return {name: jax_tree(leaf) if isinstance(leaf, dict) else jnp.asarray(leaf) for name, leaf in tree.items()}


def config_of(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())
