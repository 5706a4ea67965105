"""`combine`: several adapters of one base as one, against PEFT's `add_weighted_adapter` and closed forms."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import ADAPTERS, CASES, LAYERS, WEIGHTS
from contract.problems import jit, normal, perturbed, weight
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.compose.combine import COMBINATIONS
from jlora.compose.election import Rule

pytestmark = pytest.mark.once

GOLDEN = np.load(Path(__file__).parent / "golden" / "combine.npz")
BASE = {layer: jnp.asarray(GOLDEN[f"w/{layer}"]) for layer in LAYERS}
OURS = {"svd_rank": "rank", "svd_clamp": "clamp", "density": "density", "majority_sign_method": "majority"}
KEY = jax.random.key(0)


def peft_adapters():
    """The adapters that PEFT had."""
    found = []
    for name, (rank, alpha, layers) in ADAPTERS.items():
        adapted = jlora.adapterize(BASE, {"|".join(layers): jlora.LoRA(rank, alpha)}, KEY)
        params = {layer: {side: jnp.asarray(GOLDEN[f"{name}/{layer}/{side}"]) for side in "ab"} for layer in layers}
        found.append(adapted.replace(params=params))
    return found


@pytest.mark.once
@pytest.mark.parametrize("case", [case for case in CASES if case != "svd clipped"])
def test_what_peft_makes_of_three_adapters(case):
    options = {OURS[name]: value for name, value in CASES[case].items()}
    combination = case.split(" ")[0]
    key = KEY if combination.startswith("dare") else None
    combined = jlora.combine(peft_adapters(), WEIGHTS, combination, key=key, **options)
    for layer in LAYERS:
        a, b = (combined.params[layer][side] for side in "ab")
        wanted_a, wanted_b = (GOLDEN[f"{case}/{layer}/{side}"] for side in "ab")
        np.testing.assert_allclose(a @ b, wanted_a @ wanted_b, rtol=1e-4, atol=1e-5)
        if "svd" not in case:  # of singular vectors the sign is free
            np.testing.assert_allclose(a, wanted_a[:, : a.shape[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_clipping_is_that_of_peft():
    """Which depends on the signs of singular vectors, that no two libraries share: so the formula is compared."""

    def clipped(a, b):
        most = np.quantile(np.concatenate([np.ravel(a), np.ravel(b)]), CASES["svd clipped"]["svd_clamp"])
        return np.clip(a, -most, most), np.clip(b, -most, most)

    ours = jlora.combine(peft_adapters(), WEIGHTS, "svd", rank=2, clamp=0.9).params
    whole = jlora.combine(peft_adapters(), WEIGHTS, "dare_linear_svd", rank=2, density=1.0, key=KEY).params
    for layer in LAYERS:
        theirs = [[GOLDEN[f"{case}/{layer}/{side}"] for side in "ab"] for case in ("svd", "svd clipped")]
        for found, wanted in zip(theirs[1], clipped(*theirs[0]), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        for side, wanted in zip("ab", clipped(*whole[layer].values()), strict=True):
            np.testing.assert_allclose(ours[layer][side], wanted, rtol=1e-5, atol=1e-6)


# --- closed forms -----------------------------------------------------------------------------------------------------------

STACKED = {"stack": weight(1, 2, 6, 8), "heads": weight(2, 8, 2, 4), "norm": jnp.ones(6)}
LORA = jlora.LoRA(2, alpha=3)


def stacked(seed, method=LORA, **others):
    """An adapter of a stack of matrices, an attention kernel and a vector."""
    spec = {
        "stack": jlora.Axes("batch in out", method),
        "heads": jlora.Axes("in out out", method),
        "norm": jlora.Full(),
    }
    return perturbed(jit(lambda: jlora.adapterize(STACKED, spec | others, KEY))(), seed)


def changes(adapted):
    return jax.tree.map(lambda new, old: np.asarray(new - old), jlora.merge(adapted), adapted.base)


def summed(weights, *adapters):
    found = [changes(adapted) for adapted in adapters]
    return jax.tree.map(lambda *each: sum(w * one for w, one in zip(weights, each)), *found)


def close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def refused(match, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=match):
        jlora.combine(*arguments, **options)


PAIRS = {
    "LoRA": (LORA, LORA),
    "moved parts of the weight": (jlora.LoRA(1), jlora.LoRA(3, init="pissa")),
    "gates, shared factors": (jlora.AdaLoRA(3, 2, steps=10), jlora.VeRA(4)),
    "more ranks than the matrix": (jlora.LoRA(5), jlora.LoRA(4, scaling="rslora")),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_factors_side_by_side_are_the_sum_of_the_changes(pair):
    one, two = (stacked(seed, method) for seed, method in enumerate(PAIRS[pair]))
    both = jlora.combine([one, two], [0.7, -1.5])
    found = {site.path: site.method for site in both.plan.sites}
    assert found.pop("norm") == jlora.Full() and found["stack"].rank <= 6 and found["heads"].rank <= 8
    close(changes(both), summed([0.7, -1.5], one, two))


@pytest.mark.parametrize(
    "method", [jlora.DoRA(LORA), jlora.SHiRA("random", density=0.2), jlora.OFT(2)], ids=lambda m: type(m).__name__
)
def test_whatever_changes_weights_has_a_change_to_combine(method):
    one, two = stacked(1, method), stacked(2)
    close(changes(jlora.combine([one, two], [0.7, -1.5], "svd", rank=8)), summed([0.7, -1.5], one, two))


def test_what_has_no_factors_is_combined_by_its_change():
    one, two = stacked(1, jlora.SineLoRA(2)), stacked(2)
    refused("heads: SineLoRA.* has no factors for 'cat'", [one, two], [1, 1], error=TypeError)
    refused(r"heads: SineLoRA.* has no rank that the result could take: give rank=", [one, two], [1, 1], "svd")
    close(changes(jlora.combine([one, two], [0.7, -1.5], "svd", rank=8)), summed([0.7, -1.5], one, two))


@pytest.mark.once
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_one_adapter_may_be_combined_by_itself_in_each_way(combination):
    options = {"density": 1.0} if re.search("ties|dare|prune", combination) else {}
    found = jlora.combine([stacked(1)], [2.0], combination, key=KEY, **options)
    close(changes(found), summed([2.0], stacked(1)))


@pytest.mark.once
def test_the_nearest_of_a_rank_is_not_formed_from_the_matrix():
    one, two = stacked(1), stacked(2)
    small = changes(jlora.combine([one, two], [0.7, -1.5], "svd", rank=3))["stack"]
    u, s, v = np.linalg.svd(summed([0.7, -1.5], one, two)["stack"], full_matrices=False)
    np.testing.assert_allclose(small, (u * s[:, None])[..., :3] @ v[:, :3], rtol=1e-4, atol=1e-5)
    sizes = {jnp.shape(x) for x in jax.tree.leaves(jlora.combine([one, two], [1, 1], "svd").params["stack"])}
    assert sizes == {(2, 6, 2), (2, 2, 8)}  # by default of the larger rank


@pytest.mark.once
def test_another_split_into_factors_changes_what_adds_up_factors_alone():
    one, two = stacked(1), stacked(2)
    turn = jnp.array([[2.0, 1.0], [0.5, -1.0]])
    stack = one.params["stack"]
    turned = {"a": stack["a"] @ turn, "b": jnp.linalg.inv(turn) @ stack["b"]}
    other = one.replace(params=one.params | {"stack": turned})
    for combination, same in {"cat": True, "svd": True, "ties_svd": True, "linear": False, "ties": False}.items():
        options = {"density": 0.5} if "ties" in combination else {}
        found = [changes(jlora.combine([x, two], [1, 1], combination, **options))["stack"] for x in (one, other)]
        assert np.allclose(*found, rtol=1e-4, atol=1e-5) == same, combination


@pytest.mark.once
def test_pruning_keeps_so_many_and_random_pruning_keeps_the_mean():
    arrays = normal(1, 3, 40, 50)
    keep = lambda rule, seed=0: rule(arrays, jnp.array([1.0, 0, 0]), jax.random.key(seed))
    largest = np.asarray(keep(Rule("magnitude", density=0.3)))
    size = np.sort(np.abs(arrays[0]).ravel())[-600]
    np.testing.assert_array_equal(largest, np.where(np.abs(arrays[0]) >= size, arrays[0], 0))
    drawn = np.stack([keep(Rule("random", density=0.25), seed) for seed in range(400)])
    kept = drawn != 0
    np.testing.assert_allclose(drawn[kept], np.broadcast_to(4 * arrays[0], kept.shape)[kept])
    assert abs(kept.mean() - 0.25) < 0.005 and np.abs(kept.mean(0) - 0.25).max() < 0.12  # 5.5 deviations
    # As many of one sign as of the other: + is elected, and what is 0 has no vote and is not counted.
    three = jnp.array([[1.0, 3.0, 0.0], [-1.0, -1.0, -2.0], [0.0, -1.0, -4.0]])
    elected = lambda majority: Rule(elect=True, majority=majority)(three, jnp.array([1.0, 10.0, -1.0]), None)
    np.testing.assert_allclose(elected("total"), [1.0, 3.0, (-20 + 4) / 2])
    np.testing.assert_allclose(elected("frequency"), [1.0, (-10 + 1) / 2, (-20 + 4) / 2])


@pytest.mark.once
def test_a_leaf_that_some_leave_alone_is_combined_from_the_others():
    one = stacked(1)
    spec = {"heads": jlora.Axes("in out out", jlora.LoRA(3))}
    two = perturbed(jlora.adapterize(STACKED, spec, KEY), 2)
    close(changes(jlora.combine([two, one], [0.5, 2.0])), summed([2.0, 0.5], one, two))
    draw = lambda seed: jlora.combine([one, two], [2, 1], "dare_ties_svd", density=0.5, key=jax.random.key(seed)).params
    assert jax.tree.all(jax.tree.map(jnp.array_equal, draw(1), draw(1)))
    assert not np.array_equal(draw(1)["stack"]["a"], draw(2)["stack"]["a"])


def test_weights_may_be_traced_and_differentiated():
    one, two = stacked(1), stacked(2)

    def size(weights):
        return jnp.sum(jlora.merge(jlora.combine([one, two], weights, "linear"))["stack"] ** 2)

    at, step = jnp.array([0.7, 0.4]), jnp.array([1e-2, 0])
    slope = jax.jit(jax.grad(size))(at)[0]
    np.testing.assert_allclose(slope, (size(at + step) - size(at - step)) / 2e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_result_lies_as_a_new_adapter_would(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), (kind,) * 2)
    cuts = {"stack": P(None, "x", "y"), "heads": P("x", "y"), "norm": P("x")}
    with jax.set_mesh(mesh):
        for combination, options in {"cat": {}, "ties_svd": {"density": 0.6}}.items():
            plain = jlora.combine([stacked(1), stacked(2)], [0.7, -1.5], combination, **options)
            on_mesh = lambda x: x.replace(
                base={n: jax.device_put(w, NamedSharding(mesh, cuts[n])) for n, w in STACKED.items()}
            )
            found = jlora.combine([on_mesh(stacked(1)), on_mesh(stacked(2))], [0.7, -1.5], combination, **options)
            assert found.params["stack"]["a"].sharding.spec == P(None, "x")
            assert found.params["heads"]["b"].sharding.spec == P(None, "y")
            close(jax.device_get(changes(found)), changes(plain))


def test_what_cannot_be_combined_is_refused():
    one = stacked(1)
    other = one.replace(base=one.base | {"norm": one.base["norm"].at[1].set(2.0)})
    refused("norm: adapters 0 and 1 stand on different bases: this leaf is not the same", [one, other], [1, 1])
    less = one.replace(base={"stack": one.base["stack"]})
    refused("heads: adapters 0 and 1 have different bases: only one has this leaf", [one, less], [1, 1])
    turned = stacked(1, heads=jlora.Axes("in in out", LORA))
    refused(r"heads: adapters 0 and 1 take it differently: .* \(\(\), \(0,\), \(1, 2\)\)", [one, turned], [1, 1])
    refused(
        "heads: 'linear' adds factors of equal ranks, got \\[2, 3\\]",
        [one, stacked(2, jlora.LoRA(3))],
        [1, 1],
        "linear",
    )
    acting = jlora.Bottleneck(2)
    refused("heads: Bottleneck.* does more than change the weight", [stacked(1, acting), one], [1, 1])
    refused("wanted one weight for each adapter, got 1 adapters and weights \\(2,\\)", [one], [1, 1])
    refused("combination must be one of", [one], [1], "mean")
    refused('rank and clamp are for "svd"', [one], [1], rank=2)
    refused("rank must be a positive integer, got 0", [one], [1], "svd", rank=0)
    refused("clamp must be a quantile", [one], [1], "svd", clamp=2)
    refused("'ties' needs a density", [one], [1], "ties")
    refused("'linear' keeps all entries: leave density out", [one], [1], "linear", density=0.5)
    refused("density must be in", [one], [1], "ties", density=0.0)
    refused("'linear' keeps all entries: leave density out", [one], [1], "linear", density=0.0)
    refused("'svd' elects no sign: leave majority out", [one], [1], "svd", majority="frequency")
    refused("majority must be one of", [one], [1], "ties", density=0.5, majority="both")
    refused("draws which entries stay: pass key=", [one], [1], "dare_ties", density=0.5)
    with pytest.raises(TypeError, match="heads: bases that are arguments of jit can't be compared"):
        jax.eval_shape(lambda x, y: jlora.combine([x, y], [1, 1]), one, one)
