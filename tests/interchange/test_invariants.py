"""The invariants that PEFT tests (38 shared tests and those of its toy models), as jlora's own.

Each runs eagerly, under jit, over a scanned stack of layers, and on a mesh of eight devices, where that makes a difference.
The numbers are those of the list that the tests were drawn up from. Left out, since there is nothing here that they could
be about: unloading and unmerging modules (a merge makes a new tree, and the base is an argument), safe_merge (a merge can't
harm the base: that is checked), adapters by name, with switching, deleting and falling back (an adapter is a value; a program
holds as many as it likes), `requires_grad` (what is trained is an argument of its own), layers that print their status
(`summary`), and wrapping by FSDP or device maps (shardings are the params' own). Matching of targets is tested in
test_spec.py, 16-bit numbers and checkpointing for every method in the contract.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import jlora
from jlora import TorchParameter

pytestmark = pytest.mark.once

WIDTH, LAYERS = 16, 2
MODES = ("eager", "jit", "scan", "mesh")
LORA = jlora.LoRA(rank=2, alpha=3, init="random")
METHODS = {
    "lora": LORA,
    "rslora": jlora.LoRA(rank=2, alpha=3, scaling="rslora", init="random"),
    "dora": jlora.DoRA(LORA),
    "olora": jlora.LoRA(rank=2, alpha=3, init="olora"),
    "pissa": jlora.LoRA(rank=2, alpha=3, init="pissa", scaling="rslora"),
    "adalora": jlora.AdaLoRA(rank=3, target=2, alpha=4, steps=10),
    "vera": jlora.VeRA(rank=4),
    "shira": jlora.SHiRA("weight", rank=1),
    "full": jlora.Full(),
}
X = jnp.asarray(np.sin(np.arange(3.0 * WIDTH)).reshape(3, WIDTH), jnp.float32)


def layer(p, x):
    return jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] * p["norm"]["scale"]


def scanned(params, x):
    x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])
    return x @ params["head"]["kernel"]


def unrolled(params, x):
    for n in range(LAYERS):
        x = layer(params[f"layers_{n}"], x)
    return x @ params["head"]["kernel"]


def weight(n, *shape):
    return jnp.asarray(np.cos(np.arange(float(np.prod(shape))) * (n + 1)).reshape(shape) / 3, jnp.float32)


def block(*lead):
    return {
        "up": {"kernel": weight(0, *lead, WIDTH, WIDTH), "bias": weight(1, *lead, WIDTH)},
        "down": {"kernel": weight(2, *lead, WIDTH, WIDTH)},
        "norm": {"scale": 1 + weight(3, *lead, WIDTH)},
    }


@functools.cache
class Problem:
    """Function, params and names in one of the modes; what the tests compile of it is shared."""

    def __init__(self, mode):
        stacked = mode in ("scan", "mesh")
        tree = block(LAYERS)
        parts = [jax.tree.map(lambda leaf, n=n: leaf[n], tree) for n in range(LAYERS)]
        blocks = {"layers": tree} if stacked else {f"layers_{n}": part for n, part in enumerate(parts)}
        self.params = {**blocks, "head": {"kernel": weight(4, WIDTH, 8)}}
        if mode == "mesh":
            mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
            self.params = jax.tree.map(
                lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec_of(leaf))), self.params
            )
        self.function = scanned if stacked else unrolled
        self.jit = (lambda function: function) if mode == "eager" else jax.jit
        self.plain, self.lifted, self.merge = map(self.jit, (self.function, jlora.lift(self.function), jlora.merge))
        self.names = NAMES
        self.x = X
        self.sites = jlora.sites(self.function, self.params, self.x)

    def adapted(self, spec, move=True):
        adapted = jlora.adapterize(self.params, spec, sites=self.sites)
        return moved(adapted) if move else adapted

    def run(self, adapted):
        return self.lifted(adapted, self.x)


def spec_of(leaf):
    """The last axis of a stacked matrix is cut, everything else is whole."""
    return PartitionSpec(None, None, "x") if leaf.ndim == 3 else PartitionSpec()


NAMES = {
    r"layers/(?P<m>.*)/kernel": TorchParameter("h.{layer}.{m}.weight", "layer in out"),
    r"layers/(?P<m>.*)/scale": TorchParameter("h.{layer}.{m}.weight", "layer out", "plain"),
    r"layers/(?P<m>.*)/bias": TorchParameter("h.{layer}.{m}.bias", "layer out", "plain"),
    r"layers_(?P<layer>\d)/(?P<m>.*)/(kernel|scale|bias)": "h.{layer}.{m}",
    r"head/kernel": "head",
}
KERNELS = r".*/(up|down)/kernel"


def moved(adapted):
    """Away from the start, by a little."""
    return adapted.replace(
        params=jax.tree.map(lambda x: x + np.float32(np.sin(np.arange(x.size)).reshape(x.shape) / 9), adapted.params)
    )


close = np.testing.assert_allclose
everywhere = pytest.mark.parametrize("mode", MODES)
every_method = pytest.mark.parametrize("name", METHODS)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@everywhere
@every_method
def test_1_the_start_is_the_base_or_not_as_the_method_says(name, mode):
    problem, method = Problem(mode), METHODS[name]
    adapted = problem.adapted({KERNELS: method}, move=False)
    same = np.allclose(problem.run(adapted), problem.run(problem.params), rtol=1e-5, atol=1e-5)
    assert same == method.exact_start


@everywhere
@every_method
def test_2_a_merge_computes_what_the_adapters_compute_and_has_the_base_s_form(name, mode):
    problem = Problem(mode)
    adapted = problem.adapted({KERNELS: METHODS[name]})
    merged = problem.merge(adapted)
    close(problem.plain(merged, problem.x), problem.run(adapted), rtol=2e-5, atol=2e-5)
    assert not np.allclose(problem.run(adapted), problem.run(problem.params), rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(merged) == jax.tree.structure(problem.params)


@everywhere
def test_3_merging_again_changes_nothing_and_one_after_the_other_is_all_at_once(mode):
    problem = Problem(mode)
    both = problem.adapted({r".*/up/kernel": LORA, r".*/down/kernel": METHODS["rslora"]})
    at_once = jlora.merge(both)
    first = problem.adapted({r".*/up/kernel": LORA})
    second = jlora.adapterize(
        jlora.merge(first),
        {r".*/down/kernel": METHODS["rslora"]},
        sites=problem.sites,
    )
    jax.tree.map(lambda a, b: close(a, b, atol=1e-6), jlora.merge(moved(second)), at_once)
    nothing = jlora.Adapted(at_once, {}, {}, {}, jlora.core.tree.adapted.Plan(()))
    equal(jlora.merge(nothing), at_once)


@everywhere
def test_4_and_5_the_base_is_never_touched_not_even_by_a_broken_adapter(mode):
    problem = Problem(mode)
    before = jax.tree.map(lambda leaf: np.array(leaf), problem.params)
    expected = np.asarray(problem.run(problem.params))
    adapted = problem.adapted({KERNELS: LORA})
    broken = adapted.replace(params=jax.tree.map(lambda x: x * jnp.nan, adapted.params))
    assert np.isnan(problem.run(broken)).any()
    jlora.merge(broken)
    equal(problem.params, before)
    np.testing.assert_array_equal(problem.run(adapted.base), expected)


@everywhere
@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_6_training_changes_the_adapters_alone(name, mode):
    problem = Problem(mode)
    adapted = problem.adapted({KERNELS: METHODS[name], "head/kernel": jlora.Full()})
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=0.1)

    def step(adapted):
        gradient = jax.grad(lambda p: (problem.run(adapted.replace(params=p)) ** 2).sum())(adapted.params)
        updates, _ = tx.update(gradient, tx.init(adapted.params), adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates))

    after = problem.jit(step)(adapted)
    equal(after.base, problem.params)
    equal(after.frozen, adapted.frozen)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), after.params, adapted.params)))


@everywhere
@every_method
def test_7_saved_and_loaded_and_saved_again_is_the_same_to_the_bit(name, mode, tmp_path):
    problem = Problem(mode)
    adapted = problem.adapted({KERNELS: METHODS[name]})
    jlora.save_peft(tmp_path / "one", adapted, problem.names)
    again = jlora.load_peft(tmp_path / "one", problem.params, problem.names)
    assert again.plan == adapted.plan
    equal((again.params, again.frozen), (adapted.params, adapted.frozen))
    shardings = [[leaf.sharding for leaf in jax.tree.leaves(tree.params)] for tree in (again, adapted)]
    assert all(a.is_equivalent_to(b, 4) for a, b in zip(*shardings))
    jlora.save_peft(tmp_path / "two", again, problem.names)
    for file in ("adapter_config.json", "adapter_model.safetensors", "jlora_manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("mode", ["jit", "scan", "mesh"])
def test_9_rows_with_adapters_of_their_own_are_as_with_one_adapter_each(mode):
    problem = Problem(mode)
    adapted = problem.adapted({KERNELS: LORA})
    factors = jnp.array([0.0, 1.0, -2.0])
    several = jax.tree.map(lambda x: factors.reshape(-1, *([1] * x.ndim)) * x, adapted.params)
    lifted = jlora.lift(problem.function)
    rows = jax.jit(jax.vmap(lambda p, x: lifted(adapted.replace(params=p), x[None])[0]))(several, X)
    for n in range(3):
        one = adapted.replace(params=jax.tree.map(lambda x, n=n: x[n], several))
        close(rows[n], problem.run(one)[n], rtol=1e-4, atol=1e-4)


@everywhere
def test_11_weighted_combinations_of_two_adapters_add_their_changes(mode):
    problem = Problem(mode)
    one = problem.adapted({KERNELS: LORA})
    other = one.replace(params=jax.tree.map(lambda x: jnp.roll(x, 3), one.params))

    def change(adapted):
        return jax.tree.map(jnp.subtract, jlora.merge(adapted), problem.params)

    def cat(path, a, b):
        names = [key.key for key in path]
        return jnp.concatenate([a, b * (-0.5 if names[-1] == "b" else 1)], axis=-1 if names[-1] == "a" else -2)

    joined = jax.tree_util.tree_map_with_path(cat, one.params, other.params)
    spec = {KERNELS: jlora.LoRA(rank=4, alpha=6)}
    both = problem.adapted(spec, move=False).replace(params=joined)
    expected = jax.tree.map(lambda a, b: a - 0.5 * b, change(one), change(other))
    jax.tree.map(lambda a, b: close(a, b, atol=1e-5), change(both), expected)


def test_an_adapter_inside_a_saved_module_is_refused(tmp_path):
    params = {"patch": {"token": jnp.ones((1, 6)), "proj": {"kernel": weight(0, 6, 6)}}}
    names = {
        "patch/token": TorchParameter("patch.token", "in out", kind="plain"),
        r"(?P<m>.*)/kernel": "{m}",
    }
    adapted = jlora.adapterize(params, {"patch/token": jlora.Full(), "patch/proj/kernel": LORA})
    with pytest.raises(ValueError, match="PEFT saves the module 'patch' whole, .* such as 'patch.proj'"):
        jlora.save_peft(tmp_path / "out", adapted, names)


def test_13_a_name_that_only_begins_alike_is_not_captured(tmp_path):
    params = {name: {"kernel": weight(n, 6, 6)} for n, name in enumerate(("up", "up_more", "more_up"))}
    names = {r"(?P<m>.*)/kernel": "{m}"}
    adapted = moved(jlora.adapterize(params, {"up/kernel": LORA}))
    jlora.save_peft(tmp_path / "out", adapted, names)
    again = jlora.load_peft(tmp_path / "out", params, names)
    assert [site.path for site in again.plan.sites] == ["up/kernel"]
    equal(again.params, adapted.params)
    with pytest.raises(ValueError, match="'up' would also take 'more_up'"):
        jlora.save_peft(tmp_path / "two", jlora.adapterize(params, {"up/kernel": jlora.Full()}), names)


@everywhere
@pytest.mark.parametrize("name", ["olora", "pissa"])
def test_16_adapters_taken_from_the_weight_go_out_as_plain_lora_of_twice_the_rank(name, mode, tmp_path):
    problem = Problem(mode)
    odd = jlora.LoRA(rank=1, alpha=2, init=METHODS[name].init, scaling=METHODS[name].scaling)
    adapted = problem.adapted({r".*/up/kernel": METHODS[name], r".*/down/kernel": odd})
    jlora.save_peft(tmp_path / "out", adapted, problem.names)
    (tmp_path / "out" / "jlora_manifest.json").unlink()
    plain = jlora.load_peft(tmp_path / "out", problem.params, problem.names)
    assert {site.method.rank for site in plain.plan.sites} == {2, 4}
    assert {site.method.init for site in plain.plan.sites} == {"default"}
    close(problem.run(plain), problem.run(adapted), rtol=1e-4, atol=1e-4)


KEYS = {
    "lora": ["lora_A.weight", "lora_B.weight"],
    "dora": ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
    "adalora": ["lora_A", "lora_B", "lora_E"],
    "vera": ["vera_lambda_b", "vera_lambda_d"],
    "shira": ["shira_indices", "shira_weight"],
    "full": ["weight"],
}


@pytest.mark.parametrize("mode", ["eager", "scan", "mesh"])
@pytest.mark.parametrize("name", KEYS)
def test_19_the_keys_of_each_method_are_those_of_peft_in_every_layout(name, mode, tmp_path):
    problem = Problem(mode)
    jlora.save_peft(tmp_path / "out", problem.adapted({r".*/down/kernel": METHODS[name]}), problem.names)
    found = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    shared = {"base_model.vera_A", "base_model.vera_B"} if name == "vera" else set()
    assert found == shared | {f"base_model.model.h.{n}.down.{end}" for n in range(LAYERS) for end in KEYS[name]}


# Not OLoRA and PiSSA: a decomposition on a mesh rounds otherwise, so that they start elsewhere in the last bits.
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"olora", "pissa"}))
def test_a_sharded_adapter_goes_out_with_the_bytes_of_an_unsharded_one(name, tmp_path):
    for mode in ("scan", "mesh"):
        problem = Problem(mode)
        jlora.save_peft(tmp_path / mode, problem.adapted({KERNELS: METHODS[name]}), problem.names)
    one, other = (load_file(tmp_path / mode / "adapter_model.safetensors") for mode in ("scan", "mesh"))
    assert sorted(one) == sorted(other)
    for key in one:
        close(one[key], other[key], rtol=1e-6, atol=1e-7)
