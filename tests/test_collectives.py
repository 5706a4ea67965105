"""What each method sends from device to device in a training step, beside LoRA; and that its step is compiled once."""

import collections
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from contract import discovery, problems
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"))
import hlo

# Each mesh: its axes, and what cuts the rows of the batch, up [64, 128] and down [128, 64]. Tensor parallelism as Megatron's.
MESHES = {
    "data": ({"data": 8}, "data", P(), P()),
    "fsdp": ({"data": 2, "fsdp": 4}, ("data", "fsdp"), P("fsdp"), P(None, "fsdp")),
    "tensor": ({"fsdp": 2, "tensor": 4}, "fsdp", P("fsdp", "tensor"), P("tensor", "fsdp")),
}
# A tenth more than LoRA of rank 4, and twice the bytes of what the method trains: a gather and a sum of each.
LORA, OWN = 1.1, 2
# Methods that send more, by what factor at most, and why.
WEIGHT_AGAIN = "the gradients of its arrays need the base's weight, which is gathered for them again"
OUTPUT_AGAIN = "the gradient of a vector that scales outputs needs them, so that a checkpointed sum is made again"
BLOCKS = "its blocks cut an axis otherwise than the mesh does, and are brought to where they belong"
AS_WIDE = "its factors are as wide inside as the matrix"
ABOVE = {
    "HiRA": (WEIGHT_AGAIN, {"fsdp": 1.3}),
    "Dropout": (WEIGHT_AGAIN, {"fsdp": 1.3}),
    "GLoRA": (WEIGHT_AGAIN, {"fsdp": 1.3}),
    "DoRA": (OUTPUT_AGAIN, {"fsdp": 1.1, "tensor": 1.2}),
    "IA3": (OUTPUT_AGAIN, {"tensor": 1.1}),
    "Hadamard": (OUTPUT_AGAIN, {"tensor": 1.1}),
    "RoAd": (OUTPUT_AGAIN, {"tensor": 1.1}),
    "LoKr": (BLOCKS, {"tensor": 1.5}),
    "MoRA": (BLOCKS, {"fsdp": 1.6, "tensor": 2.3}),
    "MPO": (BLOCKS, {"fsdp": 1.8, "tensor": 1.4}),
    "RandLoRA": (AS_WIDE, {"data": 1.3, "tensor": 1.5}),
    "FourierFT": ("XLA cuts no Fourier transform of a matrix", {"fsdp": 1.6, "tensor": 3.5}),
    "SAID": ("its map goes through vectors as long as the whole matrix", {"tensor": 1.5}),
}
METHODS = {cls.__name__: cls.CASES[0] for module in discovery.modules() for cls in discovery.methods_of(module)}
# Where only rows and the base are cut it is the form of update that sends, and what leaves share.
FIRST = {method.form: name for name, method in reversed(METHODS.items())}
TRIED = [
    (name, mesh)
    for mesh in MESHES
    for name, method in METHODS.items()
    if mesh == "tensor" or name in ABOVE or name == FIRST[method.form] or method.shared_fields or not method.form
]


class Case:
    """The tiny model on a mesh."""

    def __init__(self, mesh):
        sizes, rows, up, down = MESHES[mesh]
        self.mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
        self.rows, self.pieces = self.sharding(P(rows)), 8 // sizes.get("tensor", 1)
        put = lambda x, spec: jax.device_put(x, self.sharding(spec))
        self.params = {"up_0": put(problems.weight(0, 64, 128), up), "down_0": put(problems.weight(1, 128, 64), down)}
        self.x, self.wanted = (put(problems.normal(seed, 8, 32, 64), P(rows)) for seed in (2, 3))
        self.scale = put(jnp.ones(64), P())

    def sharding(self, spec):
        return NamedSharding(self.mesh, spec)

    def model(self, params, x):
        """Both products under a checkpoint, between activations that are cut by their rows."""
        x = jax.lax.with_sharding_constraint(x, self.rows)
        y = jax.checkpoint(lambda x, p: x + jnp.tanh(x @ p["up_0"]) @ p["down_0"])(x, params)
        return jax.lax.with_sharding_constraint(y, self.rows)

    def step(self, method, optimizer=False):
        """The compiled gradient of a method's arrays and of the input's scale, or the loop's step."""
        adapted = problems.adapt(self.params, {".*": method})
        apply = jlora.lift(self.model, cuts=jlora.mesh.cuts(adapted, {"tensor"}), rows=self.pieces)
        loss = lambda p, s, a, x: jnp.mean((apply(a.replace(params=p), x * s) - self.wanted) ** 2)
        grads = jax.grad(loss, argnums=(0, 1))
        if not optimizer:
            return adapted, problems.jit(lambda a, s, x: grads(a.params, s, a, x)).lower(adapted, self.scale, self.x)
        tx = jlora.optimizer(adapted, optax.adamw, 1e-2)

        def step(adapted, state, s, x):
            found, of_scale = grads(adapted.params, s, adapted, x)
            updates, state = tx.update(found, state, adapted.params, **problems.observed(adapted))
            return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state, of_scale

        state = tx.init(adapted.params)
        return (adapted, state), problems.jit(step).lower(adapted, state, self.scale, self.x)


case = functools.cache(Case)


def sent(compiled):
    """Bytes of all collectives."""
    return sum(count * key[2] for key, count in hlo.Module(compiled.as_text()).tally().collectives.items())


@functools.cache
def lora(mesh):
    """What LoRA of rank 4 sends."""
    return sent(case(mesh).step(jlora.LoRA(4), mesh == "tensor")[1].compile())


@pytest.mark.long  # 100 seconds of one core, nearly all of them XLA's
@pytest.mark.parametrize(("name", "mesh"), TRIED)
def test_a_step_sends_little_more_than_loras_and_is_compiled_once(name, mesh):
    given, lowered = case(mesh).step(METHODS[name], mesh == "tensor")
    compiled = lowered.compile()
    adapted = given[0] if mesh == "tensor" else given
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(adapted.params))
    ratio = sent(compiled) / (LORA * lora(mesh) + OWN * own)
    reason, above = ABOVE.get(name, ("", {}))
    assert ratio <= above.get(mesh, 1), f"{ratio:.2f} of LoRA's bytes and its own, wanted {above.get(mesh, 1)} {reason}"
    assert ratio > 1 or mesh not in above, f"{name} sends {ratio:.2f}: it needs no limit of its own any more"
    if mesh == "tensor":
        before = [leaf.sharding for leaf in jax.tree.leaves(given)]
        after = jax.tree.leaves(compiled.output_shardings)[: len(before)]
        for (path, leaf), old, new in zip(jax.tree_util.tree_leaves_with_path(given), before, after, strict=True):
            assert old == new, f"{jax.tree_util.keystr(path)} {leaf.shape} lay as {old} and lies as {new}"


def test_no_dense_gradient_is_sent_where_the_rows_are_told():
    weights = {64 * 128, 64 * 128 // 4}
    for method in (jlora.SHiRA(density=0.01), jlora.HiRA(2), jlora.LoHa(2)):
        text = case("fsdp").step(method)[1].compile().as_text()
        sums = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* (?:all-reduce|reduce-scatter)\(", text)
        sizes = {functools.reduce(lambda a, b: a * int(b), shape.split(","), 1) for shape in sums if shape}
        assert not sizes & weights, f"{method}: {sums}"


def test_activations_that_are_cut_by_their_sequence_are_sent_as_often_as_without_adapters():
    tiny = case("tensor")
    cut = lambda x, *names: jax.lax.with_sharding_constraint(x, tiny.sharding(P("fsdp", *names)))

    def layer(x, p):
        h = jnp.tanh(cut(x) @ p["up_0"])
        return cut(x + cut(h, None, "tensor") @ p["down_0"], "tensor")

    def activations(run, *given):
        """How often an array as large as one device's share of activations is sent, by kind."""
        found = hlo.Module(problems.jit(jax.grad(run)).lower(*given).compile().as_text()).tally().collectives
        return collections.Counter({kind: n for (kind, _, size), n in found.items() if size == 4 * 4 * 32 * 64})

    two = lambda p, x: jnp.mean(layer(layer(x, p), p) ** 2)
    adapted = problems.adapt(tiny.params, {".*": jlora.LoRA(4)})
    lifted = jlora.lift(two, plan="factored", cuts=jlora.mesh.cuts(adapted, {"tensor"}), rows=2)
    x = jax.device_put(tiny.x, tiny.sharding(P("fsdp", "tensor")))
    plain = activations(lambda s, p, x: two(p, x * s), tiny.scale, tiny.params, x)
    both = lambda trained, a, x: lifted(a.replace(params=trained[0]), x * trained[1])
    assert activations(both, (adapted.params, tiny.scale), adapted, x) == plain
    assert plain == {"all-gather": 4, "all-reduce": 4}
