"""Sites: how a function reads its weights, what ALL_LINEAR hits, and a lift that leaves no leaf out in silence."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from jlora.models.bert import Bert, BertConfig
from jlora.models.llama import Llama, LlamaConfig

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


def through_steps(p, x):
    """One way to change a weight before its product for each leaf, named after it."""
    x = jnp.tanh(x @ p["permuted"][:, jnp.array([3, 1, 0, 2])])
    x = jnp.tanh(x @ (p["masked"] * jnp.tril(jnp.ones((4, 4)))) @ jnp.where(jnp.eye(4) > 0, 0, p["chosen"]))
    x = jnp.tanh(x @ (p["normed"] / jnp.linalg.norm(p["normed"], axis=0, keepdims=True) * p["lengths"]))
    rounded = p["rounded"] + lax.stop_gradient(jnp.round(p["rounded"] * 8) / 8 - p["rounded"])
    q, k = jnp.split(jnp.tanh(x @ rounded) @ jnp.concatenate([p["q"], p["k"]], axis=1), 2, axis=1)
    x = jnp.tanh((q * k) @ jnp.pad(p["padded"], ((0, 1), (0, 0))) + p["table"])
    x = jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(p["repeated"], (2, 4, 4))) * p["gain"]
    return x @ p["head"]


CHANGED = ("permuted", "masked", "chosen", "normed", "rounded", "q", "k", "repeated")
STEPS = {name: jnp.ones((4, 4)) for name in CHANGED}
STEPS |= {"padded": jnp.ones((3, 4)), "table": zeros(2, 4), "lengths": zeros(4), "gain": zeros(4), "head": zeros(4, 3)}


def test_all_linear_follows_weights_that_are_changed_before_their_product_and_takes_no_tables():
    report = jlora.sites(through_steps, STEPS, zeros(2, 4))
    adapted = jlora.adapterize(STEPS, {jlora.ALL_LINEAR: LORA}, sites=report)
    assert {site.path for site in adapted.plan.sites} == {*CHANGED, "padded"}
    assert {(site.in_axes, site.out_axes) for site in adapted.plan.sites} == {((0,), (1,))}


def chosen_and_scaled(p, x):
    """The one weight or the other, whatever chose it, times a third; and one that is scaled by a number of the data."""
    return jnp.tanh(x @ (jnp.where(x.sum() > 0, p["a"], p["b"]) * p["c"])) @ (x.mean() * p["d"]) @ p["head"]


def test_what_data_chooses_or_scales_by_one_number_is_a_weight():
    params = {name: zeros(4, 4) for name in "abcd"} | {"head": zeros(4, 2)}
    report = jlora.sites(chosen_and_scaled, params, zeros(2, 4))
    assert {leaf.path: (leaf.kind, leaf.roles) for leaf in report.leaves} == dict.fromkeys(
        params, ("dot", ((0,), (1,), ()))
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: jnp.expand_dims(w, 1).at[:, :, jnp.array([-3, 0])].get(mode="fill"),
        lambda w, x: jnp.take(w.reshape((2, 8), order="F"), jnp.array([0, 1]), axis=0),
        lambda w, x: jnp.einsum("bi,ijo->bjo", x, w.reshape(2, 2, 4)),
        lambda w, x: jnp.take(jnp.broadcast_to(w, (3, 4, 4)), jnp.array([0, 1]), axis=0),
    ],
    ids=[
        "a new axis is looked up in",
        "parts of an axis are rows",
        "part of an axis is contracted",
        "copies are looked up",
    ],
)
def test_an_axis_has_one_role_or_the_leaf_has_none(use):
    (leaf,) = jlora.sites(lambda p, x: use(p["w"], x), {"w": zeros(4, 4)}, zeros(3, 2)).leaves
    assert leaf.roles is None or sorted(axis for axes in leaf.roles for axis in axes) == [0, 1]


def sorted_first(p, x):
    return jnp.tanh(x @ jnp.sort(p["sorted"], axis=0)) @ p["plain"] @ p["head"]


SORTED = {"sorted": zeros(4, 4), "plain": zeros(4, 4), "head": zeros(4, 3)}


def test_all_linear_says_which_weights_it_leaves_out_and_what_to_write():
    report = jlora.sites(sorted_first, SORTED, zeros(2, 4))
    with pytest.warns(UserWarning, match=r"ALL_LINEAR leaves out sorted \(by sort\): .*") as said:
        jlora.adapterize(SORTED, {jlora.ALL_LINEAR: LORA}, sites=report)
    assert len(said) == 1 and said[0].filename == __file__
    assert '{"sorted": jlora.Axes("in out", LoRA(rank=2))}' in str(said[0].message)


def test_a_function_without_data_has_its_activations_told_from_its_weights(recwarn):
    params = {**BODY, "head": zeros(8, 11)}
    assert all_linear(lambda p: decoder(p, jnp.ones((1, 3), int)), params) == LINEAR
    assert all_linear(lambda p: decoder(p, TOKENS), params) == LINEAR
    assert not recwarn


def test_a_mask_in_a_function_without_data_is_said():
    fn = lambda p: jnp.tanh(jnp.ones((2, 4)) @ (p["masked"] * jnp.tril(jnp.ones((4, 4))))) @ p["plain"] @ p["head"]
    params = {"masked": zeros(4, 4), "plain": zeros(4, 4), "head": zeros(4, 3)}
    with pytest.warns(UserWarning, match="ALL_LINEAR leaves out masked"):
        assert all_linear(fn, params) == {"plain"}


@pytest.mark.parametrize("choice", [None, jlora.Axes("in out", LORA)])
def test_a_weight_that_the_spec_names_is_not_said_to_be_left_out(choice, recwarn):
    report = jlora.sites(sorted_first, SORTED, zeros(2, 4))
    jlora.adapterize(SORTED, {"sorted": choice, jlora.ALL_LINEAR: LORA}, sites=report)
    assert not recwarn


def experts_and_tables(p, tokens, choice):
    """Experts chosen by row, layers by a traced number, and tables of which two have three axes."""
    x = p["table"][tokens] + jnp.einsum("thd,dhe->te", p["heads"][tokens], p["mix"])
    x = x + jnp.einsum("thd,de->the", p["pieces"][tokens], p["up"]).sum(1)
    x = jnp.einsum("ti,tio->to", x, jnp.take(p["experts"], choice, axis=0))
    several = p["experts"][jnp.stack([choice, choice], axis=1)]
    x = jnp.einsum("ti,tkio->tko", x, several).sum(1) + jnp.einsum("ti,tio->to", x, several.mean(1))
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ jnp.take(p["layers"], i, axis=0)), x)


def test_a_stack_that_is_indexed_is_no_table_and_a_table_is_no_stack():
    params = {"table": zeros(7, 4), "heads": zeros(7, 2, 3), "mix": zeros(3, 2, 4), "experts": zeros(5, 4, 4)}
    params |= {"layers": zeros(3, 4, 4), "pieces": zeros(7, 2, 3), "up": zeros(3, 4)}
    report = jlora.sites(experts_and_tables, params, jnp.zeros(6, int), jnp.zeros(6, int))
    found = {leaf.path: (leaf.kind, leaf.roles) for leaf in report.leaves}
    stack = ("dot", ((1,), (2,), (0,)))
    assert found["experts"] == found["layers"] == stack
    assert found["table"] == ("gather", ((0,), (1,), ()))
    assert found["heads"] == found["pieces"] == ("gather", ((0,), (1, 2), ()))


def by_row(p, x, choice):
    """A layer and an expert for each row, as `vmap` makes them, layers that are joined for a scan, and a shared input."""
    x = jax.vmap(lambda row, n: row @ p["layers"][n])(x, choice)
    branches = [lambda row, n=n: jnp.tanh(row @ p["experts"][n]) for n in range(2)]
    x = jax.vmap(lambda row, n: lax.switch(n, branches, row))(x, choice)
    x = jax.vmap(lambda x, w, n: x @ w[n])(jnp.stack([x, x]), p["pairs"], jnp.array([1, 0])).sum(0)
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["first"], p["second"]]))[0]
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.roll(p["rolled"], 1, axis=0))[0]
    x = jax.vmap(lambda w, x: jnp.tanh(x @ w))(p["twice"], jax.vmap(lambda w: x @ w)(p["twice"])).sum(0)
    index = jnp.arange(3)[::-1]
    return jnp.einsum("ti,tio->to", x, p["again"][choice][index])


def test_stacks_are_told_through_vmap_switches_joins_and_shared_inputs():
    stacked = {"layers": zeros(3, 4, 4), "experts": zeros(2, 4, 4), "rolled": zeros(3, 4, 4), "twice": zeros(3, 4, 4)}
    params = stacked | {
        "again": zeros(3, 4, 4),
        "first": zeros(4, 4),
        "second": zeros(4, 4),
        "pairs": zeros(2, 2, 4, 4),
    }
    report = jlora.sites(by_row, params, zeros(3, 4), jnp.zeros(3, int))
    found = {leaf.path: (leaf.kind, leaf.roles) for leaf in report.leaves}
    assert found.pop("pairs") == ("dot", ((2,), (3,), (0, 1)))
    assert found.pop("first") == found.pop("second") == ("dot", ((0,), (1,), ()))
    assert set(found.values()) == {("dot", ((1,), (2,), (0,)))}


def with_vectors(p, tokens, x):
    """Tables read by slices, a prefix of tokens, a vector of scores, and an outer product: none of them a linear weight."""
    rows = lax.map(lambda n: lax.dynamic_index_in_dim(p["table"], n, keepdims=False), tokens)
    x = jnp.concatenate([p["prefix"], x + rows]) @ p["w"]
    x = x + jnp.einsum("t,io->tio", x[:, 0], p["outer"]).sum(1)
    return (jax.nn.softmax(x @ p["vector"])[:, None] * x) @ p["head"]


def test_all_linear_takes_no_prefixes_vectors_and_outer_products():
    params = {"table": zeros(7, 4), "prefix": zeros(2, 4), "w": zeros(4, 4), "outer": zeros(3, 4), "vector": zeros(4)}
    params["head"] = zeros(4, 2)
    report = jlora.sites(with_vectors, params, jnp.zeros(3, int), zeros(3, 4))
    adapted = jlora.adapterize(params, {jlora.ALL_LINEAR: LORA}, sites=report)
    assert [site.path for site in adapted.plan.sites] == ["w"]
    assert {leaf.path: leaf.roles for leaf in report.leaves}["table"] == ((0,), (1,), ())


def solved(p, x):
    return lax.custom_linear_solve(lambda v: v + v @ p["w"], x, lambda matvec, b: b - matvec(b)) @ p["head"]


def test_all_linear_without_a_weight_says_what_it_leaves_out():
    params = {"w": zeros(4, 4), "head": zeros(4, 2)}
    report = jlora.sites(solved, params, zeros(3, 4))
    with pytest.raises(ValueError, match=r"ALL_LINEAR found no weight that is contracted, and leaves out w \(by "):
        jlora.adapterize(params, {jlora.ALL_LINEAR: LORA}, sites=report)


def test_strict_names_primitive_path_and_the_users_line():
    adapted = jlora.adapterize({"layer": {"w": zeros(4, 4)}}, {"layer/w": LORA})

    def doubled(p, x):
        return x @ jnp.tanh(p["layer"]["w"])

    with pytest.raises(ValueError) as caught:
        jlora.lift(doubled, strict=True)(adapted, zeros(1, 4))
    line = doubled.__code__.co_firstlineno + 1
    for part in (
        "strict: the effective weight of layer/w, shape (4, 4)",
        "`tanh`",
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


X = jnp.ones((2, 3, 8))


def with_cache(p, x):
    keys = x @ p["k"]
    hidden = x + jax.nn.softmax(x @ jnp.swapaxes(keys, 1, 2)) @ x @ p["o"]
    return {"logits": hidden @ p["head"], "hidden": hidden, "cache": keys}


def parallel_block(p, x):
    h = norm(x, 1.0)
    return x + jnp.tanh(h @ p["a"]) @ p["b"] + jax.nn.relu(h @ p["c"]) @ p["d"]


def looped(p, x):
    layer = lambda i, x: jnp.tanh(x @ lax.dynamic_index_in_dim(p["layers"], i, keepdims=False))
    return lax.fori_loop(0, 3, layer, x @ p["first"])


def dropped_out(p, x):
    y = x @ p["head"]
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, y.shape)
    return jnp.where(keep, y / 0.9, 0.0).astype(jnp.bfloat16)[:, -1]


def span_scores(p, x):
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    blind = (1 - mask[:, None, :]).astype(x.dtype) * -1e9
    h = x + jax.nn.softmax(x @ jnp.swapaxes(x @ p["k"], 1, 2) + blind) @ x @ p["o"]
    return (h @ p["head"])[..., 0] + blind[:, 0]


def weighted_norm(p, x):
    y = x @ p["head"]
    return (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-6) * p["scale"]


MASK = jnp.tril(jnp.ones((8, 3)))
#: What a head is, one function each: (function, leaves, heads).
HEADS = {
    "after the first residual sum": (lambda p, x: (h := x + x @ p["a"]) + jnp.tanh(h) @ p["b"], "a b", ""),
    "beside the stream that it reads": (lambda p, x: (h := x @ p["a"], h @ p["b"]), "a b", "b"),
    "a stream that is scaled": (lambda p, x: norm(0.8 * x + jnp.tanh(x) @ p["a"], 1.0), "a", ""),
    "a stream that is replicated": (lambda p, x: (h := jnp.broadcast_to(x, (2, *x.shape))) + jnp.tanh(h) @ p["a"], "a", ""),
    "parallel blocks": (parallel_block, "a b c d", ""),
    "experts put back in their places": (lambda p, x: x.at[:, jnp.array([0, 2])].add(jnp.tanh(x[:, ::2]) @ p["a"]), "a", ""),
    "logits and a value": (lambda p, x: (x @ p["head"], jnp.tanh(x @ p["b"]) @ p["value"]), "b head value", "head value"),
    "two towers summed": (lambda p, x: x @ p["a"] + jnp.tanh(x) @ p["b"], "a b", "a b"),
    "tied to an embedding": (lambda p, x: (p["table"][jnp.array([1, 2])] @ p["a"]) @ p["table"].T, "table a", "table"),
    "with a bias": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["head"] + p["bias"], "a head bias", "head"),
    "with a norm after it": (weighted_norm, "head scale", "head"),
    "softcapped": (lambda p, x: 30 * jnp.tanh(x @ p["head"] / 30), "head", "head"),
    "dropped out, cast and sliced": (dropped_out, "head", "head"),
    "masked": (span_scores, "k o head", "head"),
    "in a dict with hidden states and a cache": (with_cache, "k o head", "head"),
    "scaled itself": (lambda p, x: jnp.tanh(x @ p["a"]) @ (p["head"] * 0.5), "a head", "head"),
    "masked by its input": (lambda p, x: x @ p["head"] + jnp.where(x[..., :1] > 0, 0.0, -1e9), "head", "head"),
    "masked itself": (lambda p, x: jnp.tanh(x @ p["a"]) @ (p["head"] * MASK), "a head", "head"),
    "permuted itself": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["head"][:, jnp.array([2, 0, 1])], "a head", "head"),
    "before layers in a loop": (looped, "first layers", ""),
    "before a product whose result goes nowhere": (lambda p, x: (h := x @ p["a"], h @ p["b"])[0], "a b", "a"),
    "a greedy token": (lambda p, x: jnp.argmax(x @ p["head"], -1), "head", "head"),
}  # fmt: skip
SHAPES = {"table": (11, 8), "head": (8, 3), "value": (8, 1), "bias": (3,), "scale": (3,), "layers": (3, 8, 8)}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_a_last_product_that_is_no_part_of_a_residual_stream(name):
    fn, leaves, heads = HEADS[name]
    params = {leaf: zeros(*SHAPES.get(leaf, (8, 8))) for leaf in leaves.split()}
    assert {leaf.path for leaf in jlora.sites(fn, params, X).leaves if leaf.head} == set(heads.split())


def test_hidden_states_of_unrolled_llama_and_bert_come_from_no_head():
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16, "scan_layers": False}
    llama = Llama(LlamaConfig(num_key_value_heads=1, head_dim=4, rms_norm_eps=1e-6, **sizes))
    bert = Bert(BertConfig(type_vocab_size=2, layer_norm_eps=1e-6, **sizes))
    for model, options in ((llama, {"return_hidden": True}), (bert, {})):
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        report = jlora.sites(functools.partial(model.apply, **options), {"params": params}, TOKENS)
        assert [leaf.path for leaf in report.leaves if leaf.head] == []


def test_what_only_dead_code_reads_is_not_read():
    def fn(p, x):
        jnp.take(p["w"], 0, axis=0), jnp.tanh(p["w"]), x @ p["v"]
        return lax.scan(lambda c, x: (c, (x @ p["w"], x @ p["v"])[0]), 0, x)[1]

    params = {"w": zeros(8, 8), "v": zeros(8, 8)}
    report = jlora.sites(fn, params, X)
    assert [(leaf.path, leaf.roles) for leaf in report.leaves] == [("v", None), ("w", ((0,), (1,), ()))]
    jlora.lift(fn, strict=True)(jlora.adapterize(params, {"w": LORA}, sites=report), X)
    with pytest.raises(ValueError, match="never reads the adapted leaf v"):
        jlora.lift(fn)(jlora.adapterize(params, {"v|w": LORA}), X)
