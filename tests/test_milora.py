"""MiLoRA: a router's choice for the whole layer, by hand over ten steps; decoding that keeps it; what is told in a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import adapt, close, jit, normal, perturbed, weight
from descent import descend
from models_data import quick_jit

import jlora
from jlora import NF4, LoRA, MiLoRA, models
from jlora.compose.mixtures.milora import DENOMINATOR, NUMERATOR, pooled, rational
from jlora.compose.mixtures.prompt_routed import routing_of

NAMES = ("up", "gate", "down")
MASK = jnp.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


def layer(x, w):
    y = jnp.tanh(x @ w["up"]["kernel"]) * (x @ w["gate"]["kernel"])
    return x + y @ w["down"]["kernel"]


def scanned(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, params["layers"])[0]


def unrolled(params, x):
    for name in sorted(params):
        x = layer(x, params[name])
    return x


def stack_of(size=8, wide=6):
    sizes = {"up": (size, wide), "gate": (size, wide), "down": (wide, size)}
    return {"layers": {name: {"kernel": weight(n, 2, *shape)} for n, (name, shape) in enumerate(sizes.items())}}


def sites_of(params):
    return jlora.sites(scanned, params, jnp.ones((3, 5, 8)))


def adapted_of(params=None, **settings):
    params = stack_of() if params is None else params
    spec = MiLoRA.spec(NAMES, **{"rank": 2, "alpha": 3.0, "k": 2, **settings})
    return perturbed(jlora.adapterize(params, spec, sites=sites_of(params)), 1, 0.3)


def by_hand(params, trained, x, amounts):
    """The output, and the probabilities of every layer."""
    said = []
    for n in range(2):
        own = {name: jax.tree.map(lambda leaf: leaf[n], trained["layers"][name]["kernel"]) for name in NAMES}
        router, h = own["up"], []
        for row, mask in zip(x, np.asarray(MASK, bool), strict=True):
            read = row[mask]
            shares = jnp.exp(read @ router["pool"])
            h.append((shares / shares.sum()) @ read)
        h = jnp.stack(h)
        top = sum(c * h**j for j, c in enumerate(router["numerator"]))
        below = 1 + jnp.abs(sum(c * h ** (i + 1) for i, c in enumerate(router["denominator"])))
        logits = (top / below) @ router["router"]
        p = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
        chosen = p > jnp.sort(p, axis=-1)[:, :1]  # two of three
        g = {
            "probability": jnp.where(chosen, p, 0),
            "one": chosen.astype(jnp.float32),
            "straight_through": chosen + jnp.where(chosen, p, 0) - jax.lax.stop_gradient(jnp.where(chosen, p, 0)),
        }[amounts]
        said.append(p)

        def product(x, name, g=g, own=own, n=n):
            w, m = params["layers"][name]["kernel"][n], NAMES.index(name)
            return x @ w + g[:, m, None, None] * 1.5 * (x @ own[name]["a"] @ own[name]["b"])

        x = x + product(jnp.tanh(product(x, "up")) * product(x, "gate"), "down")
    return x, jnp.stack(said)


@pytest.mark.once
@pytest.mark.parametrize(
    "amounts", ["straight_through", *(pytest.param(each, marks=pytest.mark.long) for each in ("probability", "one"))]
)
def test_ten_steps_are_those_by_hand_under_scan_and_remat(amounts):
    adapted, x = adapted_of(amounts=amounts), normal(5, 3, 5, 8)

    def balance(p):
        f = jax.nn.one_hot(jnp.argmax(p, -1), 3).mean(1)
        return 3 * jnp.sum(f * p.mean(1), -1)

    def lifted(params):
        y, said = jlora.lift(scanned, aux=True)(adapted.replace(params=params).on(prompt=MASK), x)
        return y, said["layers"]["up"]["kernel"]["probabilities"], jlora.losses.load_balance(said)

    def wanted(params):
        y, p = by_hand(adapted.base, params, x, amounts)
        return y, p, balance(p)

    def loss(outputs):
        return jnp.mean(outputs[0] ** 2) + 0.3 * jnp.sum(outputs[2])

    (seen, losses, gradients, after), (seen_by_hand, losses_by_hand, gradients_by_hand, after_by_hand) = (
        descend(outputs, adapted.params, optax.adam(0.01), 10, loss) for outputs in (lifted, wanted)
    )
    np.testing.assert_allclose(losses, losses_by_hand, rtol=1e-4)
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    close(first((losses, seen, gradients)), first((losses_by_hand, seen_by_hand, gradients_by_hand)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3), after, after_by_hand)


def test_leaves_of_their_own_are_told_what_a_stacks_matrices_are_and_choices_can_be_given():
    adapted, x = adapted_of(), normal(5, 3, 5, 8)
    loose = {f"layers_{n}": jax.tree.map(lambda leaf: leaf[n], adapted.base["layers"]) for n in range(2)}
    other = jlora.adapterize(loose, MiLoRA.spec(NAMES, rank=2, alpha=3.0, k=2))
    fields = lambda n: jax.tree.map(lambda leaf: leaf[n], adapted.params["layers"])
    other = other.replace(params={f"layers_{n}": fields(n) for n in range(2)})

    @jit
    def everything(adapted, other, x):
        y, said = jlora.lift(scanned, aux=True)(adapted.on(prompt=MASK), x)
        routing = routing_of(adapted, said)
        unrolled_y, unrolled_said = jlora.lift(unrolled, aux=True)(other.on(prompt=MASK), x)
        again = routing_of(other, unrolled_said)
        given = [jlora.lift(fn)(a.on(routing=routing), x) for fn, a in ((scanned, adapted), (unrolled, other))]
        return (y, y, y, y), (unrolled_y, *given, jlora.lift(scanned)(adapted.on(prompt=MASK), x)), routing, again

    found, wanted, routing, again = everything(adapted, other, x)
    close(found, wanted)
    close(routing, again)
    assert routing.shape == (2, 3, 3) and np.all(routing.sum(-1) == 2) and np.unique(routing, axis=1).shape[1] > 1


def test_all_modules_chosen_are_lora_and_a_coded_base_is_its_decoded_one():
    params, x = stack_of(64, 64), normal(5, 3, 5, 64)
    sites = jlora.sites(scanned, params, x)
    spec = MiLoRA.spec(NAMES, rank=2, alpha=3.0, k=3)
    adapted = perturbed(jlora.adapterize(params, spec, sites=sites), 1, 0.1).on(prompt=MASK)
    lora = jlora.adapterize(params, {".*": LoRA(2, alpha=3.0)}, sites=sites)
    factors = {name: {"kernel": {n: own["kernel"][n] for n in "ab"}} for name, own in adapted.params["layers"].items()}
    lora = lora.replace(params={"layers": factors})
    coded = jlora.quantize(params, {".*": NF4()}, sites)
    two = perturbed(jlora.adapterize(coded, MiLoRA.spec(NAMES, rank=2, k=2), sites=sites), 1, 0.1).on(prompt=MASK)
    gradient = lambda a: jax.grad(lambda p: jnp.sum(jnp.sin(jlora.lift(scanned)(a.replace(params=p), x))))(a.params)
    run = jit(lambda *each: [(jlora.lift(scanned)(a, x), gradient(a)) for a in each])
    close(*jit(lambda *each: [jlora.lift(scanned)(a, x) for a in each])(adapted, lora))
    close(*run(two, two.replace(base=jlora.dequantize(coded))))


@pytest.mark.once
def test_what_it_costs_is_that_of_its_lora_and_router():
    assert "72 multiply-adds more for each row of input" in str(jlora.explain(adapted_of()))


@pytest.mark.once
def test_pooling_leaves_out_what_is_no_prompt_and_the_rational_function_begins_near_gelu():
    x, pool = normal(0, 3, 5, 4), normal(1, 4)
    other = jnp.where(MASK[..., None] == 0, 100.0, x)
    for pooling in ("attention", "mean", "max", "last"):
        close(pooled(other, MASK == 1, pool, pooling), pooled(x, MASK == 1, pool, pooling))
        assert np.all(np.isnan(pooled(x, MASK == 2, pool, pooling)))
    close(pooled(x, MASK == 1, pool, "last"), jnp.stack([x[0, 2], x[1, 3], x[2, 1]]))
    close(pooled(x, MASK == 1, pool, "mean")[2], x[2, :2].mean(0))
    near = jnp.linspace(-5, 5, 101)
    assert np.max(np.abs(rational(near, jnp.array(NUMERATOR), jnp.array(DENOMINATOR)) - jax.nn.gelu(near))) < 0.08
    alike = {"a": {"probabilities": jnp.full((2, 3, 4), 0.25)}}
    close(jlora.losses.load_balance(alike), jnp.ones(2))


@pytest.mark.long
def test_texts_keep_what_was_chosen_for_their_prompt(tmp_path):
    model, params = models.load(models.STORIES260K)
    prompts = jnp.array([[1, 410, 403, 407], [1, 411, 288, 262]])
    sites = jlora.sites(lambda p, t: model.apply({"params": p}, t), params, prompts)
    adapted = perturbed(adapt(params, MiLoRA.spec(rank=2, alpha=2.0), sites=sites), 1, 0.1)
    apply = jlora.prompt_routed(model.apply)
    written = models.generate(apply, adapted, prompts.tolist(), max_new_tokens=4)
    whole = jnp.concatenate([prompts, jnp.array(written)], axis=1)
    mask = jnp.arange(8)[None] < jnp.array([[4], [4]])
    read = quick_jit(jlora.lift(model.apply, aux=True))
    logits, said = read({"params": adapted.on(prompt=mask)}, whole)
    assert np.array_equal(jnp.argmax(logits[:, 3:-1], axis=-1), written)
    other = read({"params": adapted.on(prompt=mask)}, jnp.where(mask, whole, 300))[1]
    close(other["layers"]["self_attn"]["q_proj"]["kernel"], said["layers"]["self_attn"]["q_proj"]["kernel"])
    jlora.save(tmp_path / "adapters", adapted)
    loaded = jlora.load(tmp_path / "adapters", params)
    assert loaded.plan == adapted.plan
    jax.tree.map(np.testing.assert_array_equal, (loaded.params, loaded.frozen), (adapted.params, adapted.frozen))


def late(params, x):
    w = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    return layer(x, {**w, "up": w["gate"], "gate": w["up"]})


def hidden_router(params, x):
    w = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    y = jax.checkpoint(lambda x: jnp.tanh(x @ w["up"]["kernel"]))(x)
    return (y * (x @ w["gate"]["kernel"])) @ w["down"]["kernel"]


def all_at_once(params, x):
    return jnp.einsum("rti,lio->lrto", x, params["layers"]["up"]["kernel"])


@pytest.mark.once
@pytest.mark.parametrize(
    ("use", "words"),
    [
        (
            lambda a, x: jlora.lift(scanned)(a, x),
            r"up/kernel: the call must say which tokens are the prompt's.*\(3, 5\)",
        ),
        (lambda a, x: jlora.lift(scanned)(a.on(prompt=MASK[:, :4]), x), r"of shape \(3, 5\); got \(3, 4\)"),
        (lambda a, x: jlora.lift(late)(a.on(prompt=MASK), x), "gate/kernel: no router of its layer came before"),
        (
            lambda a, x: jlora.lift(hidden_router)(a.on(prompt=MASK), x),
            "gate/kernel: no router of its layer came before",
        ),
        (
            lambda a, x: jlora.lift(scanned)(a.on(routing=jnp.ones((2, 4, 3))), x),
            "choices for 4 rows, but an input of shape",
        ),
        (lambda a, x: jlora.lift(scanned)(a.on(prompt=MASK[0][None]), x[0]), "the call must say which tokens"),
        (
            lambda a, x: jlora.lift(all_at_once, unread="allow")(a.on(prompt=MASK), x),
            "product is one with all layers at once",
        ),
        (lambda a, x: a.on(prompt=MASK[0]), r"prompt= takes a mask \[rows, tokens\], got shape \(5,\)"),
        (lambda a, x: a.on(routing=jnp.ones((2, 3, 7))), r"routing= takes \[layers, rows, modules\] for 3 modules"),
        (lambda a, x: jlora.prompt_routed(scanned)(a.base, x, cache=0), "wants one argument with a router"),
        (lambda a, x: jlora.prompt_routed(scanned)(a, x, cache=0), "say which tokens are the prompt's"),
        (lambda a, x: jlora.losses.load_balance({}), "no router said its probabilities"),
        (lambda a, x: MiLoRA(modules=2, k=3), "MiLoRA's module must be below its modules, and k at most these"),
    ],
)
def test_what_has_no_answer_is_refused(use, words):
    with pytest.raises(ValueError, match=words):
        use(adapted_of(), normal(5, 3, 5, 8))
