"""LoftQ: a quantized base and adapters that start as what it lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.training.errors import SettingError
from jlora.training.model.selection import make_spec
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
# NF4's levels, from the quantiles of a normal distribution (QLoRA, appendix E).
LEVELS = np.array(
    [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1], np.float32,
)  # fmt: skip
LORA = jlora.LoRA(rank=16, alpha=4, init="residual")


def nf4(w, block=64):
    """A matrix in NF4, decoded: each block of 64 inputs of an output divided by its largest magnitude, to the next level."""
    rows = np.asarray(w).T.reshape(-1, block)
    scale = np.abs(rows).max(1, keepdims=True)
    nearest = np.abs(rows[..., None] / scale[..., None] - LEVELS).argmin(-1)
    return (LEVELS[nearest] * scale).reshape(np.asarray(w).T.shape).T


def halves(w):
    """A coarse grid."""
    return jnp.round(2 * w) / 2


def by_numpy(w, rank, steps, code):
    """LoftQ's alternation as in the paper, in float64; the base and `A B`."""
    added = np.zeros_like(w)
    for _ in range(steps):
        base = code((w - added).astype(np.float32)).astype(np.float64)
        u, sigma, vt = np.linalg.svd(w - base, full_matrices=False)
        added = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    return base, added


def added(adapted, name="w", method=LORA):
    """What the adapters add, `s a b`."""
    fields = adapted.params[name]
    return np.asarray(method.scale * fields["a"] @ fields["b"])


def test_errors_on_a_gaussian_matrix_are_those_of_numpy_and_of_the_reference():
    w = np.random.default_rng(0).standard_normal((256, 128))
    spec, wanted = {"w": LORA}, [0.0771, 0.0710, 0.0686, 0.0673, 0.0665, 0.0659]
    size, params = np.linalg.norm(w), {"w": w.astype(np.float32)}
    assert np.linalg.norm(w - nf4(w)) / size == pytest.approx(0.0917, abs=1e-3)
    for steps in (1, 2, 5):
        base, prepared = jlora.loftq(params, spec, nf4, steps)
        adapted = jlora.adapterize(base, spec, prepared=prepared)
        theirs, low = by_numpy(w, 16, steps, nf4)
        error = np.linalg.norm(w - base["w"] - added(adapted)) / size
        assert error == pytest.approx(np.linalg.norm(w - theirs - low) / size, rel=1e-4)
        assert error == pytest.approx(wanted[steps - 1], abs=5e-4)
    # The first step is exact to the code; later ones start from sums that numpy rounds otherwise.
    base, prepared = jlora.loftq(params, spec, nf4)
    np.testing.assert_array_equal(base["w"], nf4(params["w"]))
    np.testing.assert_allclose(
        added(jlora.adapterize(base, spec, prepared=prepared)), by_numpy(w, 16, 1, nf4)[1], atol=2e-5
    )


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_start_is_the_truncated_svd_at_any_scale_with_balanced_factors(scaling):
    w = RNG.standard_normal((9, 6)).astype(np.float32)
    spec = {"w": jlora.LoRA(rank=3, alpha=5, scaling=scaling, init="residual")}
    adapted = jlora.adapterize({"w": w / 2}, spec, prepared=jlora.residuals({"w": w}, {"w": w / 2}, spec))
    a, b = adapted.params["w"]["a"], adapted.params["w"]["b"]
    u, sigma, vt = np.linalg.svd(w / 2)
    np.testing.assert_allclose(jlora.merge(adapted)["w"] - w / 2, (u[:, :3] * sigma[:3]) @ vt[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-5)
    rest = np.linalg.svd(w - jlora.merge(adapted)["w"], compute_uv=False)
    np.testing.assert_allclose(rest[:3], sigma[3:6], atol=1e-5)


def product(params, x):
    x = jnp.einsum("btd,dhk->bthk", x, params["heads"]).reshape(*x.shape[:2], 6)
    x = jax.lax.scan(lambda x, w: (x @ w, None), x, params["stack"])[0]
    x = jnp.einsum("btd,edf->ebtf", x, params["experts"]).sum(0)
    x = jax.lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return x @ params["out"]


SHAPES = {"heads": (6, 2, 3), "stack": (3, 6, 6), "experts": (2, 6, 6), "kernel": (3, 6, 6), "out": (6, 4)}
PARAMS = {name: jnp.asarray(RNG.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}
X = jnp.asarray(RNG.standard_normal((2, 4, 6)), jnp.float32)


@pytest.mark.parametrize("steps", [1, 3])
def test_stacks_experts_heads_and_convolutions_are_taken_matrix_by_matrix(steps):
    sites = jlora.sites(product, PARAMS, X)
    spec = {"out": jlora.LoRA(2), ".*": jlora.LoRA(rank=2, alpha=6, init="residual")}
    base, prepared = jlora.loftq(PARAMS, spec, halves, steps, sites=sites)
    adapted = jlora.adapterize(base, spec, sites=sites, prepared=prepared)
    merged, folded = jlora.merge(adapted), {site.path: site for site in adapted.plan.sites}
    assert base["out"] is PARAMS["out"]
    for name in ("heads", "stack", "experts", "kernel"):
        for tree in (PARAMS, base, merged):
            assert tree[name].shape == SHAPES[name]
        matrices = [np.asarray(folded[name].fold(tree[name])).reshape(-1, *_sides(folded[name]))
                    for tree in (PARAMS, base, merged)]  # fmt: skip
        for w, q, v in zip(*matrices, strict=True):
            theirs, low = by_numpy(w.astype(np.float64), 2, steps, lambda w: np.asarray(halves(w)))
            np.testing.assert_array_equal(q, theirs)
            np.testing.assert_allclose(v - q, low, atol=1e-5)
    np.testing.assert_allclose(jlora.lift(product)(adapted, X), product(merged, X), rtol=1e-3, atol=1e-3)


def _sides(site):
    return site.in_size, site.out_size


def test_a_sixteen_bit_base_keeps_its_dtype_and_the_residual_is_of_what_is_stored():
    w = RNG.standard_normal((12, 8)).astype(np.float32)
    spec = {"w": jlora.LoRA(rank=8, init="residual")}
    base, prepared = jlora.loftq({"w": jnp.asarray(w, jnp.bfloat16)}, spec, lambda w: halves(w) + 1e-3)
    adapted = jlora.adapterize(base, spec, prepared=prepared)
    assert base["w"].dtype == jnp.bfloat16
    stored = np.asarray(base["w"], np.float32)
    np.testing.assert_allclose(
        stored + added(adapted, method=spec["w"]), np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32), atol=1e-5
    )
    # The original of more bits is the one that counts.
    elsewhere = jlora.residuals({"w": w}, base, spec)
    assert np.allclose(stored + added(jlora.adapterize(base, spec, prepared=elsewhere), method=spec["w"]), w, atol=1e-5)


def test_residuals_of_a_base_quantized_elsewhere_are_the_first_step():
    spec = {"w": jlora.LoRA(rank=3, init="residual")}
    params = {"w": RNG.standard_normal((9, 6)).astype(np.float32), "other": np.ones(3)}
    base, prepared = jlora.loftq(params, spec, halves)
    (one,), (other,) = prepared.starts.values(), jlora.residuals(params, base, spec).starts.values()
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_ranks_that_the_residual_does_not_fill_can_learn():
    w = RNG.standard_normal((8, 6)).astype(np.float32)
    off = np.outer(np.arange(8), np.ones(6)).astype(np.float32)
    spec = {"zero|one": jlora.LoRA(rank=3, init="residual")}
    base = {"zero": w, "one": w}
    adapted = jlora.adapterize(base, spec, prepared=jlora.residuals({"zero": w, "one": w + off}, base, spec))
    np.testing.assert_array_equal(jlora.merge(adapted)["zero"], w)
    np.testing.assert_allclose(jlora.merge(adapted)["one"], w + off, atol=1e-5)
    loss = lambda p: jnp.sum(jnp.sin(jlora.merge(adapted.replace(params=p))["zero"] + jlora.merge(adapted)["one"]))
    for name, filled in (("zero", 0), ("one", 1)):
        a, b = adapted.params[name]["a"], adapted.params[name]["b"]
        assert np.allclose(np.linalg.norm(a[:, filled:], axis=0), 1) and not np.any(b[filled:])
    assert np.all(np.any(jax.grad(loss)(adapted.params)["zero"]["b"] != 0, axis=1))


def test_dora_starts_where_its_inner_method_does():
    w = RNG.standard_normal((9, 6)).astype(np.float32)
    inner = jlora.LoRA(rank=3, init="residual")
    starts = []
    for spec in ({"w": jlora.DoRA(inner)}, {"w": inner}):
        base, prepared = jlora.loftq({"w": w}, spec, halves, 3)
        starts.append(jlora.merge(jlora.adapterize(base, spec, prepared=prepared))["w"])
    np.testing.assert_allclose(*starts, rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(starts[0] - w) < 0.9 * np.linalg.norm(halves(w) - w)


def test_what_is_no_residual_is_refused_with_the_path():
    spec, w = {"a/w": jlora.LoRA(rank=2, init="residual")}, np.ones((4, 4), np.float32)
    params, good = {"a": {"w": w}}, lambda w: w / 2
    for original, problem in (
        ({"a": {"v": w}}, "a/w is in the base but not among the original params; the nearest there: .*a/v"),
        ({"a": {"w": w[:3]}}, r"a/w: the original has the shape \(3, 4\), the base \(4, 4\)"),
        ({"a": {"w": w * np.nan}}, "a/w: the original holds values that are not finite"),
        (params, "a/w and all other leaves have a residual of zeros: the base is what the original params are"),
    ):
        with pytest.raises(ValueError, match=problem):
            jlora.residuals(original, params, spec)
    with pytest.raises(ValueError, match="a/w: the base holds values that are not finite"):
        jlora.residuals(params, {"a": {"w": w * np.inf}}, spec)
    for code, problem in (
        (lambda w: w, "a/w .* residual of zeros: code gives every matrix back"),
        (lambda w: w[:2], r"a/w: code made float32 of shape \(2, 4\) of a matrix of floats of shape \(4, 4\)"),
        (lambda w: w.astype(int), r"a/w: code made int32 of shape"),
        (lambda w: w / 0, "a/w: what code made of it holds values that are not finite"),
        (lambda w: w.reshape(3), "a/w: code refuses a 4 x 4 matrix: "),
    ):
        with pytest.raises(ValueError, match=problem):
            jlora.loftq(params, spec, code)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        jlora.loftq(params, spec, good, 0)
    for others in ({"a/w": jlora.LoRA(2)}, {"a/w": jlora.LoRA(2, init="eva")}):
        with pytest.raises(ValueError, match="no method of the spec starts from a residual"):
            jlora.loftq(params, others, good)
    with pytest.raises(ValueError, match=r"a/w: LoRA.* starts from what a quantized base lost; pass .*jlora.residuals"):
        jlora.adapterize(params, spec)
    with pytest.raises(ValueError, match="or with that of jlora.residuals where one starts from a residual"):
        jlora.prepare(params, spec, lambda p, x: 0.0, [1])
    base, prepared = jlora.loftq(params, spec, good)
    with pytest.raises(ValueError, match="was not prepared"):
        jlora.adapterize(base, {"a/w": jlora.LoRA(rank=3, init="residual")}, prepared=prepared)


class Both(jlora.LoRA):
    """Wants a gradient and a residual."""

    @property
    def needs(self):
        return frozenset({"gradient", "residual"})


def test_a_method_that_wants_data_too_is_refused_and_a_spec_of_both_kinds_takes_both():
    w = RNG.standard_normal((8, 8)).astype(np.float32)
    with pytest.raises(ValueError, match=r"w: Both\(rank=2\) needs gradient beside a residual"):
        jlora.loftq({"w": w}, {"w": Both(2)}, halves)
    params, spec = {"u": w, "v": w}, {"u": jlora.LoRA(2, init="lora_ga"), "v": jlora.LoRA(2, init="residual")}
    base, one = jlora.loftq(params, spec, halves)
    other = jlora.prepare(base, spec, lambda p, x: jnp.sum(x @ p["u"] @ p["v"]), [jnp.eye(8)])
    adapted = jlora.adapterize(base, spec, prepared=jlora.Prepared(one.starts | other.starts))
    np.testing.assert_array_equal(jlora.merge(adapted)["u"], w)
    assert np.any(adapted.params["v"]["b"])


@pytest.mark.parametrize("given", [{"init": "residual"}, {"spec": {".*": {"method": "LoRA", "init": "residual"}}}])
def test_the_job_refuses_a_start_from_a_residual(given):
    settings = Settings(**({} if "spec" in given else {"rank": 4, "targets": ".*"}), **given)
    name = "init" if "init" in given else "spec"
    with pytest.raises(SettingError, match="starts from what a quantized base lost.*by jlora.loftq or") as caught:
        make_spec(None, settings)
    assert caught.value.setting == name


def test_a_randomised_start_comes_near_the_exact_one():
    w = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float32)
    found = {}
    for init in ("residual", "residual_niter_0", "residual_niter_4"):
        spec = {"w": jlora.LoRA(rank=16, init=init)}
        base = {"w": nf4(w)}
        one, other = (jlora.residuals({"w": w}, base, spec, jax.random.key(seed)) for seed in (0, 1))
        found[init], again = (jlora.merge(jlora.adapterize(base, spec, prepared=p))["w"] for p in (one, other))
        assert np.array_equal(found[init], again) == (init == "residual")
    exact, rough, near = (np.linalg.norm(w - got) for got in found.values())
    # With 8 columns more than the rank the expected error is at most sqrt(1 + 16 / 7) of the exact (Halko et al. 2011).
    assert exact < near < 1.01 * exact and near < rough < np.sqrt(1 + 16 / 7) * exact
    assert (
        jlora.LoRA(init="residual_niter_4").needs == {"residual"}
        and not jlora.LoRA(init="residual_niter_4").exact_start
    )
