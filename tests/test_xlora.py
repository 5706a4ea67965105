"""X-LoRA against PEFT over ten steps, its two passes with a cache, files, and what it refuses."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import adapt, close, jit, perturbed
from descent import descend
from models_data import quick_jit

import jlora
from jlora import LoRA, models
from jlora.compose.mixtures.xlora import XLoRA

GOLDEN = np.load(Path(__file__).parent / "golden" / "xlora.npz")
RANKS, ALPHAS = (2, 3), (4, 1.5)
ORDER = ("up", "mid", "down")  # of PEFT's modules; jlora's leaves are in the order of their names
CASES = {
    "plain": {},
    "layerwise": {"layerwise": True, "depth": 2, "size": 6, "temperature": 2.0},
    "top": {"softmax": False, "top_k": 2, "softmax_top_k": True, "depth": 3, "size": 5},
    "best": {"layerwise": True, "top_k": 1, "factor": 0.5, "train_adapters": True},
    "passed": {"pass_value": 0.25, "softmax_top_k": True, "factor": 2.0},
}


def golden(case, part):
    return {name.removeprefix(f"{case}/{part}/"): GOLDEN[name] for name in GOLDEN if name.startswith(f"{case}/{part}/")}


def model_of(case):
    base, bias = golden(case, "base"), golden(case, "bias")

    def hidden(params, x):
        return jnp.tanh(jnp.tanh(x @ params["up"] + bias["up"]) @ params["mid"] + bias["mid"])

    def fn(params, x):
        return hidden(params, x) @ params["down"] + bias["down"]

    return base, fn, hidden


def adapters_of(case, base):
    found = {}
    factors = golden(case, "adapter")
    for slot in sorted({name.split("/")[0] for name in factors}):
        n = int(slot) % 2
        adapted = jlora.adapterize(base, {".*": LoRA(RANKS[n], alpha=ALPHAS[n])})
        params = {layer: {field: jnp.asarray(factors[f"{slot}/{layer}/{field}"]) for field in "ab"} for layer in base}
        found[slot] = adapted.replace(params=params)
    return found


def classifier_of(tensors, slots, layerwise):
    """The shared fields from PEFT's classifier; columns of its last map in the order of jlora's leaves."""
    numbers = sorted({int(name.split("/")[0]) for name in tensors})
    found = {}
    for n, number in enumerate(numbers):
        for name, ours in (("weight", "w"), ("bias", "b")):
            value = tensors[f"{number}/{name}"]
            if layerwise and number == numbers[-1]:
                parts = value.reshape(*value.shape[:-1], 3, slots)
                value = parts[..., [ORDER.index(layer) for layer in sorted(ORDER)], :].reshape(value.shape)
            found[f"{ours}_{n}"] = value
    return found


def fields_of(case, part, slots):
    """All that is trained, from PEFT's tensors."""
    tensors = golden(case, part)
    own = {name.removeprefix("adapter/"): x for name, x in tensors.items() if name.startswith("adapter/")}
    classifier = {name.removeprefix("classifier/"): x for name, x in tensors.items() if name.startswith("classifier/")}
    layers = {layer: {} for layer in ORDER}
    for field, axis in (("a", 1), ("b", 0)) if own else ():
        for layer in ORDER:
            each = [own[f"{slot}/{layer}/{field}"] for slot in range(slots)]
            room = [[(0, 3 - x.shape[axis] if n == axis else 0) for n in range(2)] for x in each]
            layers[layer][field] = np.stack([np.pad(x, pad) for x, pad in zip(each, room, strict=True)])
    shared = classifier_of(classifier, slots, CASES[case].get("layerwise", False))
    return {"~shared": {"XLoRA": shared}, **layers}


@pytest.mark.once
@pytest.mark.parametrize(
    "case", [case if case in ("top", "best") else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_numbers_outputs_gradients_and_ten_steps_are_those_of_peft(case):
    base, fn, hidden = model_of(case)
    adapters, x = adapters_of(case, base), GOLDEN[f"{case}/x"]
    adapted = jlora.xlora(base, adapters, 8, **CASES[case])
    before = fields_of(case, "before", len(adapters))
    assert jax.tree.map(np.shape, adapted.params) == jax.tree.map(np.shape, before)
    run = jlora.two_passes(jlora.lift(fn, strict=True), jlora.lift(hidden, strict=True, unread="allow"), aux=True)
    start = jax.tree.map(jnp.asarray, before)
    outputs = lambda params: run(adapted.replace(params=params), x)
    y, scalings = jax.jit(outputs)(start)
    _, _, gradients, after = descend(lambda params: outputs(params)[0], start, optax.adam(0.02), steps=10)
    gradient = jax.tree.map(lambda leaf: leaf[0], gradients)
    near = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    wanted = GOLDEN[f"{case}/scalings"]  # PEFT's before it chooses, of every layer
    layers = [ORDER.index(layer) for layer in sorted(ORDER)] if CASES[case].get("layerwise") else [0]
    method = adapted.plan.sites[0].method
    near(scalings, method.kept(jnp.asarray(wanted[:, :, layers])))
    near(y, GOLDEN[f"{case}/y"])
    jax.tree.map(near, gradient, fields_of(case, "gradient", len(adapters)))
    jax.tree.map(near, after, fields_of(case, "after", len(adapters)))


STACK = {"w_0": jnp.stack([jnp.eye(8), -jnp.eye(8)]), "v_0": jnp.eye(8)}


def stacked(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x @ params["v_0"], params["w_0"])[0]


def mixture_of_stack(**settings):
    spec = lambda rank: {"w_0": jlora.Axes("batch in out", LoRA(rank)), "v_0": LoRA(rank)}
    adapters = {str(rank): perturbed(adapt(STACK, spec(rank)), rank, 0.3) for rank in (2, 3)}
    return jlora.xlora(STACK, adapters, 8, **settings)


def test_each_matrix_of_a_stack_takes_its_own_numbers_for_each_token():
    adapted = mixture_of_stack(layerwise=True)
    x, m = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(3, 5, 8), (3, 5, 3, 2)]))

    @jit
    def everything(adapted, m, x):
        fields = [adapted.frozen["v_0"], *({n: f[k] for n, f in adapted.frozen["w_0"].items()} for k in range(2))]
        y = x
        for layer, (w, own) in enumerate(zip([STACK["v_0"], *STACK["w_0"]], fields, strict=True)):
            change = jnp.einsum("...i,sir,sro,...s->...o", y, own["a"], own["b"], m[:, :, layer])
            y = y @ w + change if layer == 0 else jnp.tanh(y @ w + change)
        lifted = jlora.lift(stacked, strict=True)
        rows = jax.vmap(lambda m, x: lifted(adapted.on(scalings=m), x[None])[0])(m[:, 0], x)
        alone = lifted(adapted.on(scalings=m[:, 0]), x)
        merged = stacked(jlora.merge(adapted.on(scalings=m[0, 0])), x[0])
        return (lifted(adapted.on(scalings=m), x), alone, alone[0]), (y, rows, merged)

    close(*everything(adapted, m, x))


@pytest.mark.once
def test_what_it_costs_is_that_of_all_adapters():
    assert "288 multiply-adds more for each row of input" in str(jlora.explain(mixture_of_stack()))


@pytest.mark.once
def test_what_is_saved_is_the_same_and_a_key_drops_in_the_classifier(tmp_path):
    adapted = mixture_of_stack(depth=2, size=16, dropout=0.5)
    jlora.save(tmp_path / "mixture", adapted)
    loaded = jlora.load(tmp_path / "mixture", STACK)
    assert loaded.plan == adapted.plan
    run = jax.jit(jlora.two_passes(jlora.lift(stacked), jlora.lift(stacked), aux=True))
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    jax.tree.map(np.testing.assert_array_equal, run(loaded, x), run(adapted, x))
    drawn = [run(adapted.on(dropout=jax.random.key(n)), x)[1] for n in range(2)]
    assert not np.allclose(*drawn) and np.ptp(drawn[0][..., 0]) > 0


@pytest.mark.long
def test_texts_written_with_a_cache_for_both_passes_are_those_that_are_read_whole():
    model, params = models.load(models.STORIES260K)
    tokens = jnp.array([[1, 410, 403, 407], [1, 411, 288, 262]])
    sites = jlora.sites(lambda p, t: model.apply({"params": p}, t), params, tokens)
    spec = {jlora.ALL_LINEAR: LoRA(2)}
    adapters = {str(n): perturbed(adapt(params, spec, sites=sites), n, 0.1) for n in range(2)}
    adapted = perturbed(jlora.xlora(params, adapters, 64, layerwise=True), 1, 0.3)
    apply = jlora.two_passes(jlora.lift(model.apply))
    written = models.generate(apply, adapted, tokens.tolist(), max_new_tokens=4)
    whole = quick_jit(apply)({"params": adapted}, jnp.concatenate([tokens, jnp.array(written)], axis=1))
    assert np.array_equal(jnp.argmax(whole[:, 3:-1], axis=-1), written)


@pytest.mark.once
@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda a, x: jlora.lift(stacked)(a, x), "v_0: the call must say the adapters' amounts: .* jlora.two_passes"),
        (
            lambda a, x: a.on(scalings=jnp.ones((3, 5, 2, 2))),
            r"v_0: scalings= takes .* for 1 layers and 2 slots; got float32",
        ),
        (lambda a, x: a.on(scalings=jnp.ones((1, 2), int)), "v_0: scalings= takes numbers"),
        (lambda a, x: jlora.lift(stacked)(a.on(scalings=jnp.ones((2, 5, 1, 2))), x), r"weights for \(2, 5\) rows"),
        (
            lambda a, x: jlora.merge(a.on(scalings=jnp.ones((3, 1, 2)))),
            "v_0: rows that choose for themselves have no",
        ),
        (lambda a, x: jlora.two_passes(jlora.lift(stacked), jlora.lift(stacked))(STACK, x), "got 0 with adapters"),
        (
            lambda a, x: jlora.two_passes(jlora.lift(stacked), lambda params, x: x[..., :4])(a, x),
            r"hidden states \[rows, tokens, 8\], got shape \(3, 5, 4\)",
        ),
        (lambda a, x: XLoRA(("a",), top_k=2), "top_k must be at most the number of adapters, 1, got 2"),
        (lambda a, x: XLoRA(("a",), top_k=1, pass_value=0.5), "pass_value 0.5 is the number of all adapters"),
        (lambda a, x: XLoRA(("a",), temperature=0), "XLoRA's temperature must be positive and finite, got 0"),
    ],
)
def test_what_has_no_answer_is_refused(use, words):
    with pytest.raises(ValueError, match=words):
        use(mixture_of_stack(), jnp.ones((3, 5, 8)))
