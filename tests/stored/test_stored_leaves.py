"""Base leaves kept as a code: every function of the library gives what it gives on the decoded base, or refuses by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import discovery
from contract.problems import LAYERS_NOISE, close, jit, layers, normal, perturbed, product, weight
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rounded import Rounded

import jlora
from jlora.core.products.formed import Formed

CODE = Rounded()


def adapt_both(fn, params, x, spec, codes=None, **options):
    """Adapters on a base kept as a code, and the same on its decoded base, all trained arrays moved."""
    sites = jlora.sites(fn, params, x)
    kept = jlora.quantize(params, codes or {".*": CODE}, sites)
    found = [jlora.adapterize(base, spec, sites=sites, **options) for base in (kept, jlora.dequantize(kept))]
    return [perturbed(each, size=LAYERS_NOISE) for each in found]


def check_equal(fn, params, x, spec, codes=None, run=jit):
    """Values, gradients and merged params of a lifted function on a base kept as a code are those on the decoded base."""
    kept, decoded = adapt_both(fn, params, x, spec, codes)
    loss = lambda p, a: jnp.sum(jnp.sin(jlora.lift(fn)(a.replace(params=p), x).astype(jnp.float32)))
    program = run(jax.value_and_grad(loss))
    close(program(kept.params, kept), program(decoded.params, decoded))
    close(jlora.merge(kept), jlora.merge(decoded))


def uses(params, x):
    """A weight in every kind of product, moved and cut in every way that keeps it a weight; and one that is formed."""
    x = jnp.tanh(x @ params["q"] + x @ params["v"].T)  # the two share an activation
    x = jnp.tanh(x @ (0.5 * params["scaled"])) + jnp.einsum("bd,dhk->bhk", x, params["heads"]).reshape(x.shape)
    x = x + jnp.einsum("bhk,hkd->bd", x.reshape(-1, 2, 4), params["out"])
    x = jnp.tanh(sum(x @ params["stack"][n] for n in range(2)))
    x = x + jnp.einsum("bd,bdk->bk", x, params["stack"][jnp.array([0, 1] * 3)])
    x = lax.cond(x[0, 0] > 0, lambda x: x @ params["both"], lambda x: 2 * x @ params["both"], x)
    x = jnp.tanh(
        lax.ragged_dot(x, params["experts"], jnp.array([2, 4], jnp.int32)) @ lax.optimization_barrier(params["tied"])
    )
    image = lax.conv_general_dilated(
        x[None, None], params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for name, groups in (("grouped", 2), ("depthwise", 8)):
        image = jnp.tanh(
            lax.conv_general_dilated(
                image,
                params[name],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
        )
    return image + jnp.sum(jnp.square(params["formed"]))


USES = {
    **{name: weight(n, 8, 8) for n, name in enumerate(("q", "v", "scaled", "both", "tied", "formed"))},
    "heads": normal(6, 8, 2, 4, scale=0.3),
    "out": normal(7, 2, 4, 8, scale=0.3),
    "stack": weight(8, 2, 8, 8),
    "experts": weight(9, 2, 8, 8),
    "conv": normal(10, 1, 3, 8, 8, scale=0.2),
    "grouped": normal(11, 1, 3, 4, 8, scale=0.4),
    "depthwise": normal(12, 2, 2, 1, 8, scale=0.5),
}


def test_every_use_equals_that_of_the_decoded_base():
    roles = {"formed": jlora.Axes("in out", CODE)}
    check_equal(
        uses,
        USES,
        normal(11, 6, 8),
        {"formed": jlora.Axes("in out", jlora.LoRA(2)), ".*": jlora.LoRA(2)},
        roles | {".*": CODE},
    )


@pytest.mark.once
def test_leaves_that_are_not_adapted_are_decoded_too_with_and_without_adapters():
    x, roles = normal(11, 6, 8), {"formed": jlora.Axes("in out", CODE), ".*": CODE}
    check_equal(uses, USES, x, {"(q|stack)": jlora.LoRA(2)}, roles)
    kept = jlora.quantize(USES, roles, jlora.sites(uses, USES, x))
    close(jit(jlora.lift(uses))(kept, x), jit(uses)(jlora.dequantize(kept), x))
    # An adapter of a model whose base is an adapted one again.
    twice = [
        jlora.adapterize(each, {"base/q": jlora.LoRA(2)})
        for each in adapt_both(uses, USES, x, {"v": jlora.LoRA(2)}, roles)
    ]
    close(jlora.lift(uses)(twice[0], x), jlora.lift(uses)(twice[1], x))


def by_form():
    """A method of each form of update, and two that start from the weight."""
    found = {type(case).__mro__[0].form or Formed: case for case in reversed(discovery.cases()) if _fits(case)}
    return [*found.values(), jlora.LoRA(2, init="pissa"), jlora.DoRA(jlora.LoRA(2))]


def _fits(case):
    return case.matrix and case.mergeable and not case.needs


@pytest.mark.parametrize("method", by_form(), ids=str)
@pytest.mark.once
def test_every_form_of_update_equals_that_on_the_decoded_base(method):
    check_equal(product, {"w_0": weight(0, 8, 8)}, normal(1, 16, 8), {"w_0": method})


@pytest.mark.once
def test_stacks_under_scan_and_remat_and_casts_to_16_bits():
    check_equal(layers, {"w_0": weight(0, 3, 8, 8)}, normal(1, 16, 8), {".*": jlora.LoRA(2)})
    cast = lambda params, x: layers({"w_0": params["w_0"].astype(x.dtype)}, x)
    check_equal(cast, {"w_0": weight(0, 3, 8, 8)}, normal(1, 16, 8).astype(jnp.bfloat16), {".*": jlora.LoRA(2)})
    vmapped = lambda params, x: jax.vmap(lambda x: layers(params, x))(x[:, None])
    check_equal(vmapped, {"w_0": weight(0, 3, 8, 8)}, normal(1, 4, 8), {".*": jlora.LoRA(2)})


@pytest.mark.once
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_step_takes_no_more_memory_than_on_a_float32_base(scanned, remat):
    def fn(params, x):
        layer = lambda x, w: (x + (jnp.tanh(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None)
        layer = jax.checkpoint(layer) if remat else layer
        if scanned:
            return lax.scan(layer, x, params)[0]
        for n in range(6):
            x, _ = layer(x, {name: leaf[n] for name, leaf in params.items()})
        return x

    params = {"gate": weight(3, 6, 128, 256), "up": weight(0, 6, 128, 256), "down": weight(1, 6, 256, 128)}
    x = normal(2, 32, 128)
    sites = jlora.sites(fn, params, x)
    sizes = []
    for base in (params, jlora.quantize(params, {".*": jlora.NF4()}, sites)):
        adapted = jlora.adapterize(base, {".*": jlora.LoRA(4)}, sites=sites)
        loss = lambda p, a: jnp.sum(jlora.lift(fn)(a.replace(params=p), x) ** 2)
        found = jax.jit(jax.value_and_grad(loss)).lower(adapted.params, adapted).compile().memory_analysis()
        sizes.append(found.temp_size_in_bytes)
    dense = sum(leaf.nbytes for leaf in params.values())
    # Of the codes, the last that was measured: 4.5 bits a weight, and the trained arrays.
    assert found.argument_size_in_bytes == dense / 4 * 4.5 / 8 + 4 * 6 * 3 * 4 * (128 + 256)
    assert sizes[1] <= 1.05 * sizes[0] and dense > 0.05 * sizes[0], sizes


def on_mesh(kind):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(kind,) * 2)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    return mesh, place


@pytest.mark.once
def test_on_a_mesh_fields_are_cut_as_the_leaf_in_whole_blocks():
    mesh, place = on_mesh(AxisType.Auto)

    def fn(params, x):
        part = lambda w, x: lax.psum(x @ w, "rows")
        cut = {"mesh": mesh, "in_specs": (P("rows", "columns"), P(None, "rows")), "out_specs": P(None, "columns")}
        x = jnp.tanh(x @ params["auto"])
        for name in ("manual", "whole"):
            x = jnp.tanh(jax.shard_map(part, **cut)(params[name], x))
        return jax.shard_map(part, **{**cut, "in_specs": (P("rows", "columns"), P(None, "rows"))})(params["block"], x)

    params = {name: place(weight(n, 8, 8), "rows", "columns") for n, name in enumerate(("auto", "manual", "whole"))}
    params["block"] = place(weight(3, 8, 8), None, "columns")
    # A matrix with one scale, or with a block as long as its side, can't be cut: it is decoded before `shard_map`.
    codes = {"whole": Rounded(whole=True), "block": Rounded(block=8), ".*": CODE}
    check_equal(fn, params, normal(5, 4, 8), {".*": jlora.LoRA(2)}, codes)
    kept = jlora.quantize(params, codes)
    assert (
        kept["auto"].fields["codes"].sharding.spec
        == kept["auto"].fields["scales"].sharding.spec
        == P("rows", "columns")
    )
    assert kept["auto"].sharding == params["auto"].sharding
    assert jlora.dequantize(kept)["auto"].sharding == params["auto"].sharding
    assert kept["whole"].fields["scales"].sharding.is_fully_replicated
    start = jlora.adapterize(kept, {"auto": jlora.LoRA(2)})
    assert start.params["auto"]["a"].sharding.spec == P("rows")
    with pytest.raises(
        ValueError, match=r"auto, field scales of Rounded\(block=8\): the mesh axis rows=2 does not divide the 1"
    ):
        jlora.quantize(params, {"auto": Rounded(block=8)})


def test_on_a_mesh_with_explicit_axes():
    mesh, place = on_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        fn = lambda params, x: jnp.tanh(jnp.dot(x, params["w"], out_sharding=P(None, "columns")))
        check_equal(
            fn,
            {"w": place(weight(0, 8, 8), None, "columns")},
            place(normal(1, 4, 8)),
            {"w": jlora.LoRA(2)},
            run=jax.jit,
        )
        codes = {"heads": jlora.Axes("in in out", CODE), "w": jlora.NF4(32, double=True)}
        params = {
            "heads": place(normal(2, 4, 8, 8), None, "rows", None),
            "w": place(weight(3, 64, 8), "rows", "columns"),
        }
        kept = jlora.quantize(params, codes)
        spec = {"heads": jlora.Axes("in in out", jlora.LoRA(2, init="pissa")), "w": jlora.LoRA(2, init="pissa")}
        close(*(jlora.merge(perturbed(jlora.adapterize(base, spec))) for base in (kept, jlora.dequantize(kept))))


@pytest.mark.once
def test_shardings_by_logical_names_are_those_of_the_fields():
    mesh, _ = on_mesh(AxisType.Auto)
    adapted = jlora.adapterize(jlora.quantize({"w": weight(0, 8, 8)}, {"w": Rounded(whole=True)}), {"w": jlora.LoRA(2)})
    rules = [("embed", "rows"), ("mlp", "columns")]
    found = jlora.mesh.shardings(adapted, mesh, rules, names={"w": P("embed", "mlp")})
    placed = jax.device_put(adapted, found)
    assert placed.base["w"].sharding.spec == placed.base["w"].fields["codes"].sharding.spec == P("rows", "columns")
    assert placed.base["w"].fields["scales"].sharding.is_fully_replicated
    with pytest.raises(ValueError, match="w, field scales of"):
        blocks = jlora.adapterize(jlora.quantize({"w": weight(0, 8, 8)}, {"w": Rounded(8)}), {"w": jlora.LoRA(2)})
        jlora.mesh.shardings(blocks, mesh, rules, names={"w": P("embed", "mlp")})


@pytest.mark.once
def test_quantize_keeps_shape_dtype_and_the_rest_and_says_so():
    params = {"w": weight(0, 2, 8, 8).astype(jnp.bfloat16), "bias": jnp.zeros(8), "n": np.float32(weight(1, 8, 8))}
    kept = jlora.quantize(params, {"w": jlora.Axes("batch in out", CODE), "n": CODE})
    assert kept["bias"] is params["bias"] and isinstance(kept["n"], jlora.Stored)
    assert (kept["w"].shape, kept["w"].dtype, kept["w"].ndim, kept["w"].size) == ((2, 8, 8), jnp.bfloat16, 3, 128)
    decoded = jlora.dequantize(kept)["w"]
    assert decoded.dtype == jnp.bfloat16
    one = Rounded().decode(Rounded().encode(params["w"][1].astype(jnp.float32)), 8, 8)
    np.testing.assert_array_equal(decoded[1], one.astype(jnp.bfloat16))
    assert repr(kept["w"]) == "Stored(Rounded(), bfloat16[2, 8, 8])"
    shapes = jax.eval_shape(lambda p: jlora.quantize(p, {"n": CODE}), params)
    assert shapes["n"].fields["codes"].shape == (8, 8)
    text = jlora.summary(jlora.adapterize(kept, {"n": jlora.LoRA(2)}))
    assert "2 leaves kept as Rounded(): 192 values of 16.000 bits, 0.0 MB" in text
    assert text.endswith("trained 32 of 200 values in the base (16.00 %)")


@pytest.mark.once
def test_requantize_encodes_what_merge_decodes():
    kept, _ = adapt_both(product, {"w_0": weight(0, 8, 8)}, normal(1, 4, 8), {"w_0": jlora.LoRA(2)})
    again = jlora.requantize(kept)["w_0"]
    want = jlora.quantize(jlora.merge(kept), {"w_0": CODE})["w_0"]
    np.testing.assert_array_equal(again.fields["codes"], want.fields["codes"])
    assert float(jnp.abs(again.decoded() - jlora.merge(kept)["w_0"]).max()) > 0
    twice = jlora.requantize(perturbed(jlora.adapterize(kept, {"base/w_0": jlora.LoRA(2)})))
    assert isinstance(twice["w_0"], jlora.Stored)


@pytest.mark.once
def test_saved_adapters_know_the_form_of_their_base(tmp_path):
    params = {"w": weight(0, 8, 8), "v": weight(1, 8, 8)}
    kept = jlora.quantize(params, {".*": CODE})
    adapted = perturbed(jlora.adapterize(kept, {"w": jlora.LoRA(2)}))
    jlora.save(tmp_path / "adapters", adapted)
    close(jlora.load(tmp_path / "adapters", jlora.quantize(params, {".*": CODE})).params, adapted.params)
    for other, words in (
        (
            jlora.quantize(params, {"w": CODE, "v": Rounded(8)}),
            r"v is kept as Rounded\(\); here it is kept as Rounded\(block=8\)",
        ),
        (params, r"v is kept as Rounded\(\); here it is not quantized"),
    ):
        with pytest.raises(ValueError, match=words):
            jlora.load(tmp_path / "adapters", other)
    moved = kept["w"].fields["codes"].at[3, 3].add(1)
    changed = {**kept, "w": dataclasses.replace(kept["w"], fields={**kept["w"].fields, "codes": moved})}
    with pytest.raises(ValueError, match="was made for another base: fingerprint"):
        jlora.load(tmp_path / "adapters", changed)
    jlora.save(tmp_path / "plain", jlora.adapterize(params, {"w": jlora.LoRA(2)}))
    with pytest.raises(ValueError, match=r"v is not quantized; here it is kept as Rounded\(\)"):
        jlora.load(tmp_path / "plain", kept)


@pytest.mark.once
def test_observations_and_starts_from_data_see_the_decoded_base():
    params, x = {"w": weight(0, 8, 8), "v": weight(1, 8, 8)}, normal(2, 4, 8)
    fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]
    kept = jlora.quantize(params, {".*": CODE})
    decoded = jlora.dequantize(kept)
    seen = [jlora.observe(fn, jlora.input_norms)(jlora.watch(base, ".*"), x) for base in (kept, decoded)]
    close(seen[0], seen[1])
    loss = lambda params, x: jnp.sum(fn(params, x) ** 2)
    for method in (jlora.SHiRA("gradient", density=0.1), jlora.LoRA(2, init="eva")):
        starts = [jlora.prepare(base, {"w": method}, loss, [x]) for base in (kept, decoded)]
        found = [jlora.adapterize(b, {"w": method}, prepared=s) for b, s in zip((kept, decoded), starts)]
        close(*[(each.params, each.frozen) for each in found])


@pytest.mark.once
def test_loftq_keeps_the_base_in_the_form_of_its_code():
    params, spec = (
        {"w": weight(0, 2, 8, 8), "v": weight(1, 8, 8)},
        {"w": jlora.Axes("batch in out", jlora.LoRA(2, init="residual"))},
    )
    coarse = Rounded(block=8)
    rounded = lambda w: coarse.decode(coarse.encode(w), *w.shape)
    kept, prepared = jlora.loftq(params, spec, coarse, steps=3)
    base, want = jlora.loftq(params, spec, rounded, steps=3)
    assert isinstance(kept["w"], jlora.Stored) and kept["v"] is params["v"]
    np.testing.assert_array_equal(kept["w"].decoded(), base["w"])
    merged = [jlora.merge(jlora.adapterize(b, spec, prepared=p)) for b, p in ((kept, prepared), (base, want))]
    close(*merged)
    error = lambda tree: float(jnp.linalg.norm(tree["w"] - params["w"]))
    assert error(merged[0]) < error(jlora.dequantize(kept))
    again = jlora.residuals(params, kept, spec)
    close(jlora.merge(jlora.adapterize(kept, spec, prepared=again)), merged[0])
    with pytest.raises(ValueError, match=r"w, shape \(2, 8, 8\): block 3 does not divide its 8 rows"):
        jlora.loftq(params, spec, Rounded(block=3))


@pytest.mark.once
def test_what_merges_into_the_base_is_refused_and_chains_beside_it_go_on():
    params, key = {"w_0": weight(0, 8, 8)}, jax.random.key(1)
    kept = jlora.quantize(params, {"w_0": CODE})
    results = []
    for base in (kept, jlora.dequantize(kept)):
        adapted = perturbed(jlora.adapterize(base, {"w_0": jlora.Chain(jlora.LoRA(2), links=2)}))
        tx = jlora.optimizer(adapted, optax.sgd, learning_rate=1e-2)
        adapted, _ = jlora.restart(adapted, tx.init(adapted.params), tx, key)
        results.append(jlora.merge(perturbed(adapted)))
    close(*results)
    adapted = jlora.adapterize(kept, {"w_0": jlora.LoRA(2)})
    tx = jlora.optimizer(adapted, optax.sgd, learning_rate=1e-2)
    with pytest.raises(
        ValueError, match=r"w_0: the base is kept as Rounded\(\), into which a finished link can't be merged"
    ):
        jlora.restart(adapted, tx.init(adapted.params), tx, key)
    sparse = {"w_0": jlora.SHiRA(density=0.1)}
    with pytest.raises(
        ValueError, match=r"w_0: the base is kept as Rounded\(\), whose single entries can't be overwritten"
    ):
        jlora.pack(jlora.adapterize(kept, sparse))
    with pytest.raises(
        ValueError, match=r"w_0: the base is kept as Rounded\(\), whose single entries can't be overwritten"
    ):
        jlora.switch(kept, jlora.pack(jlora.adapterize(params, sparse)))
    with pytest.raises(
        ValueError, match=r"w_0 is kept as Rounded\(\), and Full\(.*\) trains the leaf itself; decode it first"
    ):
        jlora.adapterize(kept, {"w_0": jlora.Full()})


@pytest.mark.once
def test_peft_files_of_a_base_kept_as_a_code_are_those_of_the_decoded_base(tmp_path):
    params = {"layers": {"0": {"q_proj": {"kernel": weight(0, 8, 8)}, "v_proj": {"kernel": weight(1, 8, 8)}}}}
    names = {
        f"layers/0/{name}/kernel": jlora.TorchParameter(f"model.layers.0.{name}.weight")
        for name in ("q_proj", "v_proj")
    }
    kept = jlora.quantize(params, {".*": CODE})
    for number, base in enumerate((kept, jlora.dequantize(kept))):
        adapted = perturbed(jlora.adapterize(base, {".*q_proj.*": jlora.LoRA(2, init="pissa")}))
        jlora.save_peft(tmp_path / str(number), adapted, names)
    files = [tmp_path / str(number) / "adapter_model.safetensors" for number in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = jlora.load_peft(tmp_path / "0", kept, names)
    close(
        jlora.merge(again)["layers"],
        jlora.merge(jlora.load_peft(tmp_path / "1", jlora.dequantize(kept), names))["layers"],
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("params", "spec", "words"),
    [
        ({"w": weight(0, 6, 8)}, {"w": CODE}, r"w, shape \(6, 8\): block 4 does not divide its 6 rows"),
        ({"w": jnp.zeros((8, 8), jnp.int32)}, {"w": CODE}, "holds int32; only floating-point"),
        ({"w": weight(0, 8, 8)}, {"v": CODE}, "matches no leaf"),
        ({"w": weight(0, 8, 8)}, {"w": jlora.LoRA(2)}, "must be a code such as jlora.NF4"),
        ({"w": weight(0, 8, 8)}, [CODE], "a spec maps patterns to codes"),
        ({"w": weight(0, 8, 8).at[2, 3].set(jnp.nan)}, {"w": CODE}, "w holds values that are not finite"),
        ({"w": weight(0, 2, 8, 8)}, {"w": CODE}, r'jlora.Axes\("batch in out", Rounded\(\)\)'),
        ({"w": jnp.zeros((8, 0))}, {"w": CODE}, "w, shape .*: it holds no values"),
        ({"w": jnp.zeros(8)}, {"w": CODE}, "Rounded\\(\\) adapts a matrix; leave it out"),
    ],
)
def test_quantize_refuses(params, spec, words):
    with pytest.raises((ValueError, TypeError), match=words):
        jlora.quantize(params, spec)


@pytest.mark.once
def test_leaves_kept_as_a_code_are_no_arrays():
    kept = jlora.quantize(
        {"w": weight(0, 2, 8, 8), "e": weight(1, 8, 8)}, {"w": jlora.Axes("batch in out", CODE), "e": CODE}
    )
    with pytest.raises(ValueError, match=r"w is kept as Rounded\(\) already"):
        jlora.quantize(kept, {"w": jlora.Axes("batch in out", CODE)})
    for use in (lambda w: jnp.ones((3, 8)) @ w, np.asarray, jnp.sum, lambda w: w[0], lambda w: 2 * w):
        with pytest.raises(TypeError, match=r"is kept as Rounded\(\) and is no array: run the function by jlora.lift"):
            use(kept["e"])
    with pytest.raises(ValueError, match="e: rows of it are looked up"):
        jlora.lift(lambda p, i: p["e"][i])(kept, jnp.array([1, 2]))
    lookup = lambda p, i: p["e"][i]
    with pytest.raises(ValueError, match="looks up rows of it"):
        jlora.quantize(
            {"e": weight(1, 8, 8)}, {"e": CODE}, jlora.sites(lookup, {"e": weight(1, 8, 8)}, jnp.array([1, 2]))
        )
    cut = jax.tree.map(lambda x: x[:1], kept)
    with pytest.raises(ValueError, match="was cut or joined outside of a lifted function"):
        jlora.dequantize(cut)
    with pytest.raises(
        ValueError, match=r"w, shape \(2, 8, 8\), is kept as Rounded\(\), but its field .* was cut or joined"
    ):
        jlora.lift(lambda p, x: jnp.tanh(x @ p["w"][1]))({"w": cut["w"]}, jnp.ones((3, 8)))
    with pytest.raises(TypeError, match="got an Adapted, whose trained arrays would be rounded"):
        jlora.quantize(jlora.adapterize(kept, {"e": jlora.LoRA(2)}), {"base/.*": CODE})
    with pytest.raises(ValueError, match=r"e is kept as Rounded\(\) already; start from the original"):
        jlora.loftq(kept, {"e": jlora.LoRA(2, init="residual")}, CODE)
    with pytest.raises(ValueError, match="is kept as .* with the axes 'in out', but is to be adapted with 'out in'"):
        jlora.adapterize(kept, {"e": jlora.Axes("out in", jlora.LoRA(2))})
