"""Sites: how a function reads its weights, what ALL_LINEAR hits, and a lift that leaves no leaf out in silence."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora

LORA = jlora.LoRA(rank=2)
TOKENS = jnp.array([[1, 2, 3]])


def zeros(*shape):
    return jnp.zeros(shape)


def norm(x, scale):
    return x * scale / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def block(x, p):
    """A Llama-like layer: attention with heads, a gated feed-forward."""
    h = norm(x, p["norm"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["o"])
    h = norm(x, p["norm"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


LAYER = {"norm": (8,), "q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)}
LAYER |= {"gate": (8, 12), "up": (8, 12), "down": (12, 8)}
LINEAR = {f"layers/{name}" for name in LAYER if name != "norm"}


def stack(layers=3):
    return {name: zeros(layers, *shape) for name, shape in LAYER.items()}


def decoder(params, tokens):
    x = jnp.take(params["embedding"], tokens, axis=0)
    x = lax.scan(jax.checkpoint(lambda x, p: (block(x, p), None)), x, params["layers"])[0]
    x = norm(x, params["norm"])
    return x @ (params["head"] if "head" in params else params["embedding"].T)


def encoder(params, tokens):
    x = jnp.take(params["embedding"], tokens, axis=0)
    x = lax.scan(lambda x, p: (block(x, p), None), x, params["layers"])[0]
    return norm(x, params["norm"])


BODY = {"embedding": zeros(11, 8), "layers": stack(), "norm": zeros(8)}


def all_linear(fn, params, *args):
    adapted = jlora.adapterize(params, {jlora.ALL_LINEAR: LORA}, sites=jlora.sites(fn, params, *args))
    return {site.path for site in adapted.plan.sites}


def test_all_linear_is_everything_in_a_decoder_but_the_head():
    assert all_linear(decoder, {**BODY, "head": zeros(8, 11)}, TOKENS) == LINEAR


def test_a_tied_head_is_not_linear_either():
    assert all_linear(decoder, BODY, TOKENS) == LINEAR


def test_an_encoder_without_a_head_loses_nothing():
    assert all_linear(encoder, BODY, TOKENS) == LINEAR


def test_a_classifier_on_an_encoder_loses_its_last_layer_only():
    params = {**BODY, "pool": zeros(8, 8), "classes": zeros(8, 3)}
    classify = lambda p, tokens: jnp.tanh(encoder(p, tokens)[:, 0] @ p["pool"]) @ p["classes"]
    assert all_linear(classify, params, TOKENS) == LINEAR | {"pool"}


def test_the_unrolled_decoder_gives_the_same_as_the_scanned_one():
    def unrolled(params, tokens):
        x = jnp.take(params["embedding"], tokens, axis=0)
        for n in range(2):
            x = block(x, params["layers"][n])
        return x @ params["head"]

    layers = [{name: zeros(*shape) for name, shape in LAYER.items()} for _ in range(2)]
    found = all_linear(unrolled, {**BODY, "layers": layers, "head": zeros(8, 11)}, TOKENS)
    assert found == {f"layers/{n}/{name}" for n in range(2) for name in LAYER if name != "norm"}


def test_roles_of_every_leaf_are_reported():
    report = jlora.sites(decoder, BODY, TOKENS)
    roles = {leaf.path: (leaf.kind, leaf.roles) for leaf in report.leaves}
    assert roles["layers/q"] == ("dot", ((1,), (2, 3), (0,)))
    assert roles["layers/o"] == ("dot", ((1, 2), (3,), (0,)))
    assert roles["layers/down"] == ("dot", ((1,), (2,), (0,)))
    assert roles["embedding"] == ("gather", ((0,), (1,), ()))
    assert roles["norm"] == (None, None)
    line = next(line for line in str(report).splitlines() if line.startswith("layers/o"))
    assert line.split() == ["layers/o", "3x2x4x8", "batch", "in", "in", "out", "dot_general"]


def test_nothing_is_computed_and_shapes_will_do():
    shapes = jax.eval_shape(lambda: BODY)
    assert jlora.sites(decoder, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32)) == jlora.sites(decoder, BODY, TOKENS)


def test_the_params_may_sit_below_the_top_of_the_argument():
    report = jlora.sites(
        lambda variables, x: x @ variables["params"]["w"], {"params": {"w": zeros(2, 3, 4)[0]}}, zeros(5, 3)
    )
    assert [leaf.path for leaf in report.leaves] == ["params/w"]
    (site,) = jlora.adapterize({"w": zeros(3, 4)}, {"w": LORA}, sites=report).plan.sites
    assert site.keys == ("w",)


def test_a_trace_of_other_params_is_refused():
    report = jlora.sites(lambda p, x: x @ p["w"], {"w": zeros(3, 4)}, zeros(5, 3))
    for params in ({"v": zeros(3, 4)}, {"w": zeros(3, 5)}):
        with pytest.raises(
            ValueError, match=r"sites was traced on other params: leaf '[vw]', shape \(3, [45]\).*\['w'\]"
        ):
            jlora.adapterize(params, {".": LORA}, sites=report)


def test_a_trace_of_a_modules_arrays_serves_the_whole_module_and_names_the_leaf_that_differs():
    model = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    report = jlora.sites(lambda arrays, x: eqx.combine(arrays, static)(x), arrays, zeros(4))
    (site,) = jlora.adapterize(model, {jlora.ALL_LINEAR: LORA}, sites=report).plan.sites
    assert site.path == "layers/0/weight" and site.in_axes == (1,)
    wider = eqx.tree_at(lambda model: model.layers[1].weight, model, zeros(4, 5))
    with pytest.raises(
        ValueError, match=r"leaf 'layers/1/weight', shape \(4, 5\), is not among its 4 leaves \(nearest: "
    ):
        jlora.adapterize(wider, {jlora.ALL_LINEAR: LORA}, sites=report)


def test_sites_without_params_is_refused():
    with pytest.raises(
        TypeError, match=r"sites\(fn, params, \.\.\.\) needs the function's arguments, the params first"
    ):
        jlora.sites(lambda: 1)


def test_a_leaf_that_no_product_contracts_is_refused_with_the_way_it_is_read():
    params = {"w": zeros(4, 4)}
    report = jlora.sites(lambda p, x: x * p["w"], params, zeros(4, 4))
    with pytest.raises(
        ValueError,
        match=r"w, shape \(4, 4\): the function reads it by mul, so that no product contracts it; use jlora.Full\(\)",
    ):
        jlora.adapterize(params, {"w": LORA}, sites=report)


def test_a_leaf_that_is_not_read_is_refused_by_name():
    params = {"w": zeros(4, 4), "v": zeros(4, 4)}
    report = jlora.sites(lambda p, x: x @ p["w"], params, zeros(1, 4))
    with pytest.raises(ValueError, match=r"v, shape \(4, 4\): the function reads it by nothing"):
        jlora.adapterize(params, {"v": LORA}, sites=report)


def test_a_leaf_whose_uses_disagree_is_refused():
    params = {"w": zeros(2, 4, 4)}
    fn = lambda p, x: (
        jnp.einsum("bi,hio->bho", x, p["w"]).sum() + jnp.einsum("bhi,hio->bo", jnp.ones((1, 2, 4)), p["w"]).sum()
    )
    report = jlora.sites(fn, params, zeros(1, 4))
    with pytest.raises(
        ValueError, match=r"w, shape \(2, 4, 4\): .*its products contract different axes; .*jlora.Axes\("
    ):
        jlora.adapterize(params, {"w": LORA}, sites=report)


def test_a_lifted_function_that_never_reads_an_adapted_leaf_is_refused():
    adapted = jlora.adapterize({"v": zeros(4, 4), "w": zeros(4, 4)}, {".": LORA})
    use_w = lambda p, x: x @ p["w"]
    with pytest.raises(
        ValueError, match=r"never reads the adapted leaf v: take them out of the spec, or lift with unread=\"allow\""
    ):
        jlora.lift(use_w)(adapted, zeros(1, 4))
    with pytest.raises(ValueError, match="never reads the adapted leaves v, w: "):
        jlora.lift(lambda p, x: x)(adapted, zeros(1, 4))
    assert jlora.lift(use_w, unread="allow")(adapted, zeros(1, 4)).shape == (1, 4)


def test_unread_is_error_or_allow():
    with pytest.raises(ValueError, match='unread must be "error" or "allow", got \'ignore\''):
        jlora.lift(lambda p: p, unread="ignore")


def test_strict_names_primitive_path_and_the_users_line():
    adapted = jlora.adapterize({"layer": {"w": zeros(4, 4)}}, {"layer/w": LORA})

    def doubled(p, x):
        return x @ (p["layer"]["w"] * 2)

    with pytest.raises(ValueError) as caught:
        jlora.lift(doubled, strict=True)(adapted, zeros(1, 4))
    line = doubled.__code__.co_firstlineno + 1
    for part in (
        "strict: the effective weight of layer/w, shape (4, 4)",
        "`mul`",
        f"test_sites.py:{line} (",
        "doubled",
    ):
        assert part in str(caught.value)


def test_a_lifted_function_without_adapted_params_is_the_function():
    assert float(jlora.lift(lambda p, x: p * x)(3.0, 4.0)) == 12.0


def test_several_adapted_trees_in_one_call_are_all_lifted():
    w = jnp.eye(4)
    one, two = (
        jlora.adapterize({"w": w * n}, {"w": jlora.LoRA(rank=2, init="random")}, key=jax.random.key(n)) for n in (1, 2)
    )
    fn = lambda trees, x: x @ trees["one"]["w"] @ trees["two"]["w"]
    got = jlora.lift(fn)({"one": one, "two": two}, w)
    wanted = fn({"one": jlora.merge(one), "two": jlora.merge(two)}, w)
    assert jnp.max(jnp.abs(got - wanted)) < 1e-5
