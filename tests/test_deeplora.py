"""Deep LoRA: the authors' numbers, the compression against the wide product that it stands for, and its limits."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.methods.deeplora import bases

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "deeplora.npz"))
KERNELS = ("square", "wide", "tall")
RNG = np.random.default_rng(0)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def golden(prefix):
    """The entries below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}


def product(factors):
    """`f_last @ .. @ f_1` in double precision."""
    return np.linalg.multi_dot([np.asarray(f, np.float64) for f in reversed(factors)])


def low_rank(rows, columns, rank):
    """A matrix with `rank` singular values between 0.5 and 1, and nothing else."""
    u, _, vt = np.linalg.svd(RNG.standard_normal((rows, columns)), full_matrices=False)
    return (u[:, :rank] * np.linspace(1, 0.5, rank)) @ vt[:rank]


def bases_by_null_spaces(factors, gradient, rank):
    """`left`, `right` in the authors' way, from all the wide factors (first that on the output's side) of norm 1.

    What the wide first factor's gradient leaves alone on both sides is the intersection of two null spaces; `right` is what
    remains of the whole space.
    """
    if gradient.shape[0] > gradient.shape[1]:
        right, left = bases_by_null_spaces([f.T for f in reversed(factors)], gradient.T, rank)
        return left, right
    half, first = rank // 2, factors[0]
    u, _, vt = np.linalg.svd(product(factors[1:]).T @ gradient)
    ours, theirs = first.T @ u[:, half:], vt[half:].T
    coefficients = np.linalg.svd(np.hstack([ours, -theirs]))[2][len(first) :].T
    right = np.linalg.svd(ours @ coefficients[: ours.shape[1]])[0][:, -rank:]
    return product(factors) @ right, right


def same_spaces(got, wanted, tolerance):
    """Whether two pairs of bases span the same spaces and give the same update; bases of a space are arbitrary."""
    for mine, theirs in zip(got, wanted, strict=True):
        mine, theirs = (np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)[0] for x in (mine, theirs))
        np.testing.assert_allclose(mine @ mine.T, theirs @ theirs.T, atol=tolerance)
    left, right = np.asarray(got[0]), np.asarray(got[1])
    np.testing.assert_allclose(left @ right.T, wanted[0] @ wanted[1].T, atol=tolerance)


# --- against the authors' code -----------------------------------------------------------------------------------------


def model(params, x):
    for name in KERNELS:
        x = jnp.sin(x @ params[name])
    return jnp.sum(x, axis=-1)


def loss_fn(params, batch):
    return jnp.mean((model(params, batch["x"]) - batch["labels"]) ** 2)


BASE = golden("base/")
BATCH = {name: GOLDEN[name] for name in ("x", "labels")}


@pytest.mark.parametrize("name", KERNELS)
def test_the_null_spaces_are_those_of_the_authors(name):
    wide = {each: [GOLDEN[f"wide/{each}/W{n}"] / 0.1 for n in (1, 2, 3)] for each in KERNELS}
    params = {each: BASE[each] + 1e-3 * product(wide[each]).astype(np.float32) for each in KERNELS}
    gradient = np.asarray(jax.grad(loss_fn)(params, BATCH)[name], np.float64)
    theirs = [GOLDEN[f"compressed/start/{name}/{side}"] for side in ("left", "right")]
    same_spaces(bases_by_null_spaces([f.astype(np.float64) for f in wide[name]], gradient, 4), theirs, 1e-3)


def fields_of(prefix, names):
    return {each: {mine: GOLDEN[f"{prefix}/{each}/{theirs}"] for mine, theirs in names.items()} for each in KERNELS}


COMPRESSED = {"left": "left", "right": "right", "m1": "mf/W1", "m2": "mf/W2", "m3": "mf/W3"}
NARROW = {"f1": "W1", "f2": "W2", "f3": "W3"}


@pytest.mark.parametrize(("form", "names"), [("narrow", NARROW), ("compressed", COMPRESSED)])
def test_training_takes_the_authors_steps(form, names):
    spec = {".*": jlora.DeepLoRA(rank=4, eps=0.1, gamma=0.5, compressed=form == "compressed")}
    prepared = jlora.prepare(BASE, spec, loss_fn, [BATCH]) if form == "compressed" else None
    adapted = jlora.adapterize(BASE, spec, prepared=prepared)
    start = fields_of(f"{form}/start", names)
    assert jax.tree.map(jnp.shape, adapted.params) == jax.tree.map(jnp.shape, start)
    tx = jlora.optimizer(adapted, optax.adamw, optax.linear_schedule(1e-2, 1e-3, 5), eps=1e-6, weight_decay=0.0)

    def loss(p):
        return jlora.lift(loss_fn)(adapted.replace(params=p), BATCH)

    def step(carry, _):
        p, state = carry
        value, gradients = jax.value_and_grad(loss)(p)
        updates, state = tx.update(gradients, state, p)
        return (optax.apply_updates(p, updates), state), value

    (after, _), losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=5))(start)
    close(losses, GOLDEN[f"{form}/losses"])
    jax.tree.map(partial(close, atol=1e-4), after, fields_of(f"{form}/after", names))


# --- the compression against the wide product --------------------------------------------------------------------------

SHAPES = [(12, 12), (10, 16), (16, 10), (15, 16)]


def wide_factors(left, right, depth=3):
    """Wide factors of norm 1 whose product, with orthonormal rows or columns, takes `right` to `left`."""
    if len(left) > len(right):
        return [f.T for f in reversed(wide_factors(right, left, depth))]
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    rank, width = left.shape[1], len(right)
    rest = np.linalg.svd(right)[0][:, rank:]
    u, sigma, _ = np.linalg.svd(np.eye(len(left)) - left @ left.T)
    assert np.all(sigma[width - rank :] < 1e-5)
    root = np.zeros((len(left), width - rank))
    filled = min(root.shape)
    root[:, :filled] = u[:, :filled] * np.sqrt(sigma[:filled])
    start = left @ right.T + root @ rest.T
    np.testing.assert_allclose(start @ start.T, np.eye(len(left)), atol=1e-5)
    inner = [np.linalg.qr(RNG.standard_normal((width, width)))[0] for _ in range(depth - 1)]
    return [*inner, start @ product(inner).T]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_compressed_start_is_the_wide_one_projected(shape):
    gradient = RNG.standard_normal(shape)
    left, right = bases(jax.random.key(3), jnp.asarray(gradient, jnp.float32), 2)
    whole = right if shape[0] <= shape[1] else left
    np.testing.assert_allclose(whole.T @ whole, np.eye(4), atol=1e-5)
    wide = wide_factors(left, right)
    same_spaces((left, right), bases_by_null_spaces(wide, gradient, 4), 1e-3)
    projected = product(wide) @ right @ right.T if shape[0] <= shape[1] else left @ left.T @ product(wide)
    np.testing.assert_allclose(left @ right.T, projected, atol=1e-5)


def test_the_images_under_the_wide_start_are_drawn_uniformly():
    gradient = jnp.asarray(RNG.standard_normal((6, 10)), jnp.float32)
    left, right = jax.jit(jax.vmap(lambda key: bases(key, gradient, 2)))(jax.random.split(jax.random.key(0), 4000))
    t, x = left[:, :, 2:], right[:, :, :2]
    np.testing.assert_allclose(jnp.mean(x, axis=0), np.zeros((10, 2)), atol=0.02)
    np.testing.assert_allclose(jnp.mean(x @ x.mT, axis=0), 0.2 * np.eye(10), atol=0.02)
    # Two of the eight directions beside `u` in ten dimensions, of which four are among the six rows.
    np.testing.assert_allclose(jnp.mean(t.mT @ t, axis=0), np.eye(2) / 2, atol=0.02)


def test_a_randomised_svd_finds_the_same_spaces():
    gradient = jnp.asarray(low_rank(40, 30, 2) + 0.01 * RNG.standard_normal((40, 30)), jnp.float32)
    exact, fast = jax.jit(lambda: [bases(jax.random.key(0), gradient, 2, iterations) for iterations in (0, 4)])()
    for mine, theirs in zip(fast, exact, strict=True):
        np.testing.assert_allclose(abs(mine), abs(theirs), atol=1e-3)  # singular vectors have no sign


def descend(adapted, target, steps, gamma=None):
    """`w`, which starts at zero, along gradient descent on half the squared distance to the target."""
    tx = jlora.optimizer(adapted, optax.sgd, learning_rate=0.2)

    def loss(p):
        return 0.5 * jnp.sum((jlora.merge(adapted.replace(params=p))["w"] - target) ** 2)

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), jlora.merge(adapted.replace(params=p))["w"]

    p = adapted.params
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, (p, tx.init(p)), length=steps))()[1])


def compressed(target, **options):
    target = jnp.asarray(target, jnp.float32)
    params, spec = {"w": jnp.zeros_like(target)}, {"w": jlora.DeepLoRA(compressed=True, **options)}
    prepared = jlora.prepare(params, spec, lambda p, t: 0.5 * jnp.sum((p["w"] - t) ** 2), [target])
    return jlora.adapterize(params, spec, prepared=prepared)


@pytest.mark.parametrize(
    ("shape", "gamma"),
    [
        ((16, 16), 0),
        ((18, 12), 0.5),
        pytest.param((16, 16), 0.5, marks=pytest.mark.long),
        pytest.param((12, 18), 0, marks=pytest.mark.long),
    ],
)
def test_descent_on_the_compressed_product_ends_where_that_on_the_wide_one_does(shape, gamma):
    target = low_rank(*shape, 2)
    narrow = compressed(target, rank=4, eps=0.1, gamma=gamma)
    fields = {**narrow.params["w"], **narrow.frozen.get("w", {})}
    wide = jlora.adapterize(narrow.base, {"w": jlora.DeepLoRA(rank=max(shape), eps=0.1)})
    factors = wide_factors(fields["left"], fields["right"])
    wide = wide.replace(params={"w": {f"f{n}": jnp.asarray(0.1 * f, jnp.float32) for n, f in enumerate(factors, 1)}})
    paths = [descend(each, target, 300) for each in (narrow, wide)]
    np.testing.assert_allclose(paths[0][-1], target, atol=2e-3)
    np.testing.assert_allclose(paths[0][-1], paths[1][-1], atol=1e-3 * np.linalg.norm(target))
    if not gamma:  # with fixed bases, step by step; moving bases only help it along
        np.testing.assert_allclose(paths[0], paths[1], atol=1e-2 * np.linalg.norm(target))


@pytest.mark.parametrize("form", ["narrow", "compressed"])
def test_the_update_takes_the_rank_of_the_target_not_its_own(form):
    target = low_rank(16, 20, 2)
    if form == "compressed":
        adapted = compressed(target, rank=8, eps=0.05)
    else:
        adapted = jlora.adapterize({"w": jnp.zeros((16, 20))}, {"w": jlora.DeepLoRA(rank=8, eps=0.05)})
    sigma = np.linalg.svd(descend(adapted, target, 600)[-1], compute_uv=False)
    np.testing.assert_allclose(sigma[:2], [1, 0.5], atol=1e-3)
    assert np.sum(sigma > 1e-2) == 2, sigma


# --- start, depth two, precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "eps"), [(3, 1e-3), (4, 0.1)])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_the_start_has_size_eps_to_the_depth(shape, depth, eps):
    w = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    fields = jlora.adapterize({"w": w}, {"w": jlora.DeepLoRA(rank=4, depth=depth, eps=eps)}).params["w"]
    assert list(fields) == [f"f{n}" for n in range(1, depth + 1)]
    sigma = np.linalg.svd(product(list(fields.values())), compute_uv=False)
    np.testing.assert_allclose(sigma[:4], eps**depth, rtol=1e-6 * depth)
    np.testing.assert_allclose(sigma[4:], 0, atol=1e-12)


def test_the_compressed_start_has_size_eps_to_the_depth():
    fields = compressed(low_rank(12, 12, 5), rank=6, eps=1e-2, depth=4).params["w"]
    assert all(np.array_equal(fields[f"m{n}"], 1e-2 * jnp.eye(6)) for n in (1, 2, 3, 4))
    start = 1e-8 * np.asarray(fields["left"], np.float64) @ np.asarray(fields["right"], np.float64).T
    np.testing.assert_allclose(np.linalg.svd(start, compute_uv=False)[:6], 1e-8, rtol=1e-5)


def test_depth_two_is_lora_with_a_standard_normal_factor():
    params, x = {"w": jnp.asarray(RNG.standard_normal((40, 50)), jnp.float32)}, jnp.ones((3, 40))
    deep = jlora.adapterize(params, {"w": jlora.DeepLoRA(rank=30, depth=2)})
    f1, f2 = deep.params["w"]["f1"], deep.params["w"]["f2"]
    assert not np.any(f2) and abs(np.std(f1) - 1) < 0.05 and abs(np.mean(f1)) < 0.1
    lora = jlora.adapterize(params, {"w": jlora.LoRA(rank=30, alpha=30, init="embedding")})

    def outcome(adapted, names):
        p = {"w": dict(zip(names, (f2 + 0.1, f1), strict=True))}
        lifted = jlora.lift(lambda params: jnp.sum(jnp.sin(x @ params["w"])))
        value, gradients = jax.value_and_grad(lambda p: lifted(adapted.replace(params=p)))(p)
        return [value, *(gradients["w"][name] for name in names)]

    for mine, theirs in zip(outcome(deep, ("f2", "f1")), outcome(lora, ("a", "b")), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_16_bit_base_does_not_swallow_the_factors():
    params = {"w": jnp.asarray(RNG.standard_normal((16, 16)), jnp.bfloat16)}
    adapted = jlora.adapterize(params, {"w": jlora.DeepLoRA(rank=4)})
    x = jnp.ones((3, 16), jnp.bfloat16)

    def loss(p, run):
        return jnp.sum(jnp.sin(run(p).astype(jnp.float32)))

    lifted = jlora.lift(lambda params: x @ params["w"], plan="factored")
    runs = [lambda p: lifted(adapted.replace(params=p)), lambda p: x @ jlora.merge(adapted.replace(params=p))["w"]]
    for gradients in (jax.grad(loss)(adapted.params, run)["w"] for run in runs):
        for name, gradient in gradients.items():
            size = float(jnp.linalg.norm(gradient))
            assert gradient.dtype == jnp.float32 and 1e-7 < size < 1e-3, f"{name}: {size}"


def test_rates_and_groups():
    params = {"w": jnp.zeros((8, 8))}
    method = jlora.DeepLoRA(rank=2, gamma=0.25)
    (site,) = jax.eval_shape(lambda params: jlora.adapterize(params, {"w": method}), params).plan.sites
    assert method.labels(site) == {"f1": "b", "f2": "a", "f3": "a"} and method.rates(site) == {}
    outer = jlora.DeepLoRA(rank=2, gamma=0.25, compressed=True)
    assert outer.labels(site) == {"left": "a", "right": "b", "m1": "a", "m2": "a", "m3": "a"}
    assert outer.rates(site) == {"left": 0.25, "right": 0.25}


def test_outer_factors_at_rate_zero_are_constants():
    adapted = compressed(low_rank(8, 8, 2), rank=4, gamma=0)
    assert set(adapted.params["w"]) == {"m1", "m2", "m3"} and set(adapted.frozen["w"]) == {"left", "right"}
    state = jlora.optimizer(adapted, optax.adam, 1e-3).init(adapted.params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim == 2) == 2 * 3 * 16


def test_a_lookup_learns_at_the_embeddings_rate():
    params = {"table": jnp.zeros((9, 8))}
    sites = jlora.sites(lambda params: jnp.take(params["table"], jnp.arange(3), axis=0), params)
    spec = {"table": jlora.DeepLoRA(rank=2)}
    (site,) = jax.eval_shape(lambda params: jlora.adapterize(params, spec, sites=sites), params).plan.sites
    assert set(site.method.labels(site).values()) == {"embedding"}


# --- size ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iterations", "arrays"), [(0, 4), (4, 1.25)])
def test_compressing_a_wide_leaf_takes_a_few_arrays_of_its_size(iterations, arrays):
    """Of a stack of four too: compiled temporary memory in arrays of 4096 x 4096."""
    gradients = jax.ShapeDtypeStruct((4, 4096, 4096), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    compress = jax.vmap(lambda key, gradient: bases(key, gradient, 4, iterations))
    memory = jax.jit(compress).lower(keys, gradients).compile().memory_analysis()
    assert memory.temp_size_in_bytes < arrays * 4 * 4096**2, memory.temp_size_in_bytes / (4 * 4096**2)


@pytest.mark.long
@pytest.mark.parametrize(("width", "iterations"), [(1024, 0), (4096, 4)])
def test_a_wide_leaf_is_compressed(width, iterations):
    target = RNG.standard_normal((width, 4)) @ RNG.standard_normal((4, width)) / width**0.5
    adapted = compressed(target, rank=8, iterations=iterations)
    left, right = adapted.params["w"]["left"], adapted.params["w"]["right"]
    np.testing.assert_allclose(right.T @ right, np.eye(8), atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(left @ (left.T @ target)), jnp.linalg.norm(target), rtol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "DeepLoRA's rank must be an integer of at least 1, got 0"),
        ({"depth": 1}, "DeepLoRA's depth must be an integer of at least 2, got 1"),
        ({"depth": 2, "compressed": True}, "compressed DeepLoRA's depth must be an integer of at least 3, got 2"),
        ({"rank": 3, "compressed": True}, "compressed DeepLoRA needs an even rank, got 3"),
        ({"compressed": 1}, "DeepLoRA's compressed must be True or False, got 1"),
        ({"eps": 0}, "DeepLoRA's eps must be positive and finite, got 0"),
        ({"gamma": -1}, "DeepLoRA's gamma must be finite and not negative, got -1"),
        ({"iterations": -1}, "DeepLoRA's iterations must be an integer of at least 0, got -1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        jlora.DeepLoRA(**wrong)


def test_matrices_that_are_too_small_or_too_coarse_are_refused():
    params = {"w": jnp.zeros((4, 6))}
    with pytest.raises(ValueError, match="rank 8 is above the larger side of the 4 x 6 matrix; use 6 or less"):
        jlora.adapterize(params, {"w": jlora.DeepLoRA(rank=8)})
    with pytest.raises(ValueError, match="rank 6 is above the smaller side of the 4 x 6 matrix; use 4 or less"):
        jlora.adapterize(params, {"w": jlora.DeepLoRA(rank=6, compressed=True)})
    with pytest.raises(ValueError, match=r"w.*eps\*\*depth = 1e-09 is zero in float16, and so are its gradients"):
        jlora.adapterize({"w": jnp.zeros((4, 6), jnp.float16)}, {"w": jlora.DeepLoRA(rank=2)})
