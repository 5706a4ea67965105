"""Methods that multiply the weight, its inputs or its outputs. Their values and gradients are held against PEFT in
`tests/interchange/test_from_peft.py` and `test_training_golden.py`; here is what those can't show.
"""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
ROWS, COLUMNS = 12, 8
BASE = {"w": jnp.asarray(RNG.standard_normal((ROWS, COLUMNS)) / 4, jnp.float32)}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def started(method, base=BASE, size=0.3):
    """The start with noise on all that is trained."""
    adapted, rng = jlora.adapterize(base, {"w": method}, key=jax.random.key(1)), np.random.default_rng(2)
    noisy = lambda leaf: leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)
    return adapted.replace(params=jax.tree.map(noisy, adapted.params))


def merged(adapted):
    return np.asarray(jlora.merge(adapted)["w"], np.float64)


def fields(adapted):
    return {name: np.asarray(leaf, np.float64) for name, leaf in adapted.params["w"].items()}


def product(params, x):
    return jnp.matmul(x, params["w"], preferred_element_type=jnp.float32)


# --- formulas in numpy ---------------------------------------------------------------------------------------------------


def rotation(q, side, terms):
    """The series, or for `terms` 0 the exact rotation, of one block."""
    s, identity = np.zeros((side, side)), np.eye(side)
    s[np.triu_indices(side, 1)] = q
    s -= s.T
    if not terms:
        return (identity - s) @ np.linalg.inv(identity + s)
    powers = [np.linalg.matrix_power(s, n) for n in range(4 if terms == 3 else terms)]  # as in PEFT
    return powers[0] + (2 * sum(powers[1:-1]) + powers[-1] if terms > 2 else 2 * powers[1])


@pytest.mark.parametrize("terms", [0, 2, 3, 4, 5, 7])
def test_oft_is_the_product_with_its_blocks_one_by_one(terms):
    options = {"terms": terms} if terms else {"neumann": False}
    adapted = started(jlora.OFT(block=4, **options))
    w, q = np.asarray(BASE["w"], np.float64), fields(adapted)["q"]
    close(merged(adapted), np.concatenate([rotation(q[k], 4, terms) @ w[4 * k : 4 * k + 4] for k in range(3)]))


def test_the_two_settings_of_oft_turn_against_each_other():
    q = 0.01 * RNG.standard_normal(6)
    close(rotation(q, 4, 0) @ rotation(q, 4, 5), np.eye(4))
    series, exact = (started(jlora.OFT(block=4, neumann=each), size=0.01) for each in (True, False))
    w, halfway = np.asarray(BASE["w"], np.float64), (merged(series) + merged(exact)) / 2
    assert np.abs(merged(series) - w).max() > 10 * np.abs(halfway - w).max()


def butterfly(r, side):
    """The factors of a BOFT one after the other as whole matrices, by the places that each block acts on."""
    size = r.shape[1] * side
    whole, half = np.eye(size), side // 2
    for number, blocks in enumerate(r):
        factor, reach = np.zeros((size, size)), 2**number
        for block, values in enumerate(blocks):
            group, place = divmod(block, reach)
            chunks = (
                [2 * reach * group + place, 2 * reach * group + place + reach] if number else [2 * block, 2 * block + 1]
            )
            at = np.concatenate([np.arange(chunk * half, (chunk + 1) * half) for chunk in chunks])
            skew, identity = (values - values.T) / 2, np.eye(side)
            factor[np.ix_(at, at)] = (identity - skew) @ np.linalg.inv(identity + skew)
        whole = factor @ whole
    return whole


@pytest.mark.parametrize(("block", "depth", "rows"), [(2, 2, 12), (2, 3, 16), (4, 2, 8)])
def test_boft_is_the_product_of_its_factors_with_the_first_one_next_to_the_weight(block, depth, rows):
    base = {"w": jnp.asarray(RNG.standard_normal((rows, 5)), jnp.float32)}
    adapted = started(jlora.BOFT(block, depth=depth), base)
    p = fields(adapted)
    close(merged(adapted), butterfly(p["r"], block) @ np.asarray(base["w"], np.float64) * p["s"])


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_hra_reflects_the_weight_by_one_column_after_the_other(rank):
    adapted = started(jlora.HRA(rank))
    w = np.asarray(BASE["w"], np.float64)
    for u in fields(adapted)["u"].T:
        w = w - 2 * np.outer(u, u @ w) / (u @ u)
    close(merged(adapted), w)


@pytest.mark.parametrize(
    "method", [jlora.OFT(4, neumann=False), jlora.HRA(3), jlora.HRA(3, True), jlora.OFT(0, 3)], ids=str
)
def test_a_rotation_keeps_lengths_of_columns_and_the_angles_between_them(method):
    w, turned = np.asarray(BASE["w"], np.float64), merged(started(method, size=0.05))
    assert np.abs(turned - w).max() > 0.01
    np.testing.assert_allclose(turned.T @ turned, w.T @ w, rtol=1e-3, atol=1e-3)


# --- starts --------------------------------------------------------------------------------------------------------------


def test_reflections_start_in_equal_pairs_and_where_they_can_not_as_another_function():
    u = lambda method: np.asarray(jlora.adapterize(BASE, {"w": method}, key=jax.random.key(0)).params["w"]["u"])
    pairs = u(jlora.HRA(4))
    np.testing.assert_array_equal(pairs[:, 0::2], pairs[:, 1::2])
    assert np.ptp(pairs[:, 0] - pairs[:, 2]) > 0 and np.abs(pairs).max() < 2**-0.5
    for method in (jlora.HRA(3), jlora.HRA(4, gram_schmidt=True)):
        assert np.linalg.matrix_rank(u(method)) == method.rank
        start = merged(jlora.adapterize(BASE, {"w": method}))
        assert not method.exact_start and np.isfinite(start).all() and np.abs(start - BASE["w"]).max() > 0.1


# --- products ------------------------------------------------------------------------------------------------------------

EACH = [
    jlora.OFT(4),
    jlora.OFT(0, 2, neumann=False, block_share=True),
    jlora.BOFT(2, depth=2),
    jlora.HRA(4),
    jlora.HRA(2, gram_schmidt=True),
    jlora.IA3(),
    jlora.IA3("input"),
    jlora.RoAd(group=4),
]


@pytest.mark.parametrize("method", EACH, ids=str)
def test_no_product_or_gradient_forms_a_rotation_or_a_weight(method):
    adapted = jlora.adapterize({"w": jnp.ones((24, 40))}, {"w": method})
    loss = lambda p, x: jnp.sum(jnp.sin(jlora.lift(product, strict=True)(adapted.replace(params=p), x)))
    program = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(adapted.params, jnp.ones((3, 24))))
    assert "dot_general" in program
    # The transpose of the base in the gradient of the input is all there may be.
    made = re.findall(r"f32\[(?:24,24|24,40|40,24|40,40)\](?: \w+:\S+)* = (\w+)", program)
    assert set(made) <= {"transpose"}, program


@pytest.mark.parametrize("method", EACH, ids=str)
def test_a_small_change_reaches_the_output_of_a_16_bit_base(method):
    base, x = {"w": BASE["w"].astype(jnp.bfloat16)}, jnp.asarray(RNG.standard_normal((16, ROWS)), jnp.bfloat16)
    start = jlora.adapterize(base, {"w": method}, key=jax.random.key(0))
    small = started(method, base, size=1e-4)
    before, after = (np.asarray(jlora.lift(product)(each, x), np.float64) for each in (start, small))
    weights = [
        np.asarray(jlora.merge(each.replace(base={"w": base["w"].astype(jnp.float32)}))["w"], np.float64)
        for each in (start, small)
    ]
    wanted = np.asarray(x, np.float64) @ (weights[1] - weights[0])
    assert np.sum((after - before) * wanted) / np.sum(wanted * wanted) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("method", "number"), [(jlora.OFT(4), 24 * 4), (jlora.HRA(4), 2 * 24 * 4), (jlora.IA3(), 40)], ids=str
)
def test_explain_counts_what_a_row_costs_and_not_what_the_blocks_are_made_of(method, number):
    text = jlora.explain(jlora.adapterize({"w": jnp.ones((24, 40))}, {"w": method}))
    assert f" {number} multiply-adds more" in text


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jlora.OFT(block=8, blocks=2), "OFT takes either block, .* or blocks, .* got block=8 and blocks=2"),
        (lambda: jlora.BOFT(block=0), "BOFT takes either block, .* got block=0 and blocks=0"),
        (lambda: jlora.OFT(terms=1), "terms must be an integer of at least 2, got 1"),
        (lambda: jlora.OFT(coft=True, eps=0.0), "eps must be positive and finite, got 0.0"),
        (lambda: jlora.OFT(neumann=1), "neumann must be True or False, got 1"),
        (lambda: jlora.BOFT(depth=0), "depth must be a positive whole number, got 0"),
        (lambda: jlora.IA3("both"), r"side must be one of \('output', 'input'\), got 'both'"),
        (lambda: jlora.RoAd("road_3"), "variant must be one of .*'road_4'.*, got 'road_3'"),
        (lambda: jlora.RoAd(group=3), "group must be a positive even number, got 3"),
        (lambda: jlora.HRA(0), "rank must be a positive whole number, got 0"),
    ],
)
def test_hyperparameters_that_can_not_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (jlora.OFT(5), "block 5 must divide the 12 inputs of the 12 x 8 matrix; use 4, 6, 3, 2, 12"),
        (jlora.OFT(1), "block 1 must divide the 12 inputs of the 12 x 8 matrix; use 2, 3, 4, 6, 12"),
        (jlora.OFT(0, 12), "blocks 12 must divide the 12 inputs of the 12 x 8 matrix; use 6, 4, 3, 2, 1"),
        (jlora.BOFT(3, depth=2), "block 3 must give 2 factors of an even side that divide the 12 inputs .*; use 2, 6"),
        (
            jlora.BOFT(2, depth=4),
            "block 2 must give 4 factors .* 12 inputs .*; no number does; leave it out of the spec",
        ),
        (jlora.HRA(13), "rank 13 is above the 12 inputs of the 12 x 8 matrix; use 12 or less"),
        (jlora.RoAd(), "group 64 must divide the 8 outputs of the 12 x 8 matrix; use 8, 4, 2"),
    ],
)
def test_matrices_that_can_not_be_adapted_are_refused_with_what_does_divide(method, words):
    with pytest.raises(ValueError, match=rf"^w, shape \(12, 8\): {words}"):
        jlora.adapterize(BASE, {"w": method})


# --- PEFT's folders ------------------------------------------------------------------------------------------------------

PARAMS = {name: {"kernel": BASE["w"], "bias": jnp.arange(8.0)} for name in ("key", "value", "down")}


def names(path):
    return path.replace("/kernel", ".weight").replace("/bias", ".bias")


def test_one_folder_of_peft_holds_scales_of_outputs_and_of_inputs(tmp_path):
    adapted = jlora.adapterize(PARAMS, {"(key|value)/kernel": jlora.IA3(), "down/kernel": jlora.IA3("input")})
    noisy = jax.tree.map(lambda leaf: leaf + jnp.linspace(-1, 1, leaf.size), adapted.params)
    jlora.save_peft(tmp_path / "out", adapted.replace(params=noisy), names)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["feedforward_modules"]) == (["down", "key", "value"], ["down"])
    (tmp_path / "out" / "jlora_manifest.json").unlink()
    again = jlora.load_peft(tmp_path / "out", PARAMS, names)
    assert again.plan == adapted.plan
    jax.tree.map(np.testing.assert_array_equal, again.params, noisy)


def test_servers_of_lora_take_reflections_without_loss(tmp_path):
    adapted = jlora.adapterize(PARAMS, {"down/kernel": jlora.HRA(3)})
    report = jlora.save_peft(tmp_path / "out", adapted, names, profile="serving", svd_rank=3)
    assert report.peft_type == "LORA" and report.residuals["down/kernel"] < 1e-5


def test_an_older_folder_of_a_series_of_rotations_warns_that_it_means_another_function(tmp_path):
    for method in (jlora.OFT(4), jlora.OFT(4, neumann=False)):
        folder = tmp_path / str(method.neumann)
        jlora.save_peft(folder, jlora.adapterize(PARAMS, {"down/kernel": method}), names)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config.get("peft_version") == ("0.18.0" if method.neumann else None)
        (folder / "jlora_manifest.json").unlink()
        for version in ("0.17.1", None):
            (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
            if method.neumann:
                with pytest.warns(
                    UserWarning, match="use_cayley_neumann meant something else before PEFT 0.18.0"
                ) as warned:
                    jlora.load_peft(folder, PARAMS, names)
                assert [each.filename for each in warned] == [__file__]
            else:
                jlora.load_peft(folder, PARAMS, names)


# --- meshes --------------------------------------------------------------------------------------------------------------


def test_a_bias_beside_is_not_changed_once_for_each_part_of_the_inputs():
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,))
    params, x = (
        {"kernel": BASE["w"], "bias": jnp.ones(COLUMNS)},
        jnp.asarray(RNG.standard_normal((3, ROWS)), jnp.float32),
    )

    def fn(params, x):
        body = lambda x, w: jax.lax.psum(x @ w, "model")
        run = jax.shard_map(body, mesh=mesh, in_specs=(P(None, "model"), P("model")), out_specs=P())
        return run(x, params["kernel"]) + params["bias"]

    scaled = jlora.adapterize(params, {"kernel": jlora.IA3()})
    scaled = scaled.replace(params=jax.tree.map(lambda leaf: leaf + jnp.linspace(-1, 1, leaf.size), scaled.params))
    np.testing.assert_allclose(jax.jit(jlora.lift(fn))(scaled, x), fn(jlora.merge(scaled), x), rtol=1e-5, atol=1e-5)
