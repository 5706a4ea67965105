"""The contract: what every method must do. Each check takes a method and knows nothing of it but what it declares."""

import copy
import functools
import json
import math
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from contract import problems
from contract.problems import adapt, by_hand, close, jit, perturbed
from jlora import paths
from jlora.core.tree.adapted import SHARED, count
from jlora.optimize.optimizer import GROUPS


def _outputs(problem, adapted):
    return jlora.lift(problem.fn, strict=True)(adapted, problem.x)


def _loss(outputs):
    return jnp.sum(jnp.sin(outputs))


def check_start(method):
    """The start is the base's output, unless the method declares otherwise; then it is not."""
    tried = problems.shapes(method)
    outputs = jit(lambda: [(p.fn(p.params, p.x), _outputs(p, p.adapted)) for p in tried])()
    for base, start in outputs:
        distance = float(jnp.max(jnp.abs(start - base)))
        assert (distance < 1e-5) == method.exact_start, f"start is {distance} away, exact_start={method.exact_start}"


def check_agree(method):
    """The lifted product equals `x @ weight` for random params, in values and in the gradient of the params."""
    _agree(problems.shapes(method)[1:])  # a square one hides mistakes that the others show


def _agree(tried):
    """Asserts that the lifted functions equal those with the weights written out, in outputs and gradients.

    What is written out is taken apart where the weights are: the functions of them are the same for all methods, and so are
    compiled once.
    """

    @jit
    def first():
        perturbed = [problem.perturbed() for problem in tried]
        return [
            (_value_and_gradient(lambda p: _outputs(problem, a.replace(params=p)), a.params), _written(a))
            for problem, a in zip(tried, perturbed, strict=True)
        ]

    lifted, written = zip(*first(), strict=True)
    outputs, gradients = zip(
        *(_of_weights(p.fn, w, p.x) for p, (w, _) in zip(tried, written, strict=True)), strict=True
    )
    pulls = [pull for _, pull in written]
    back = jit(lambda pulls, gradients: [pull(g)[0] for pull, g in zip(pulls, gradients, strict=True)])(
        pulls, gradients
    )
    close(list(lifted), list(zip(outputs, back, strict=True)))


def _written(adapted):
    """The weights written out, and the pull of their gradients back to the params."""
    return jax.vjp(lambda p: by_hand(adapted.replace(params=p)), adapted.params)


@functools.partial(jit, static_argnums=0)
def _of_weights(fn, weights, x):
    return _value_and_gradient(lambda weights: fn(weights, x), weights)


def _value_and_gradient(f, p):
    """`f(p)` and the gradient of a fixed random sum of it: a linear loss adds no rounding where the outputs are large."""
    value, pull = jax.vjp(f, p)
    return value, pull(problems.normal(7, *value.shape).astype(value.dtype))[0]


def check_merge(method):
    """Merged params in the plain function give the adapted output; dtype, sharding and other leaves stay."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", "model"))
    problem = problems.plain(method)
    base = {"w_0": jax.device_put(problem.adapted.base["w_0"], sharding), "other": jnp.ones(3)}
    adapted = perturbed(problem.adapted).replace(base=base)
    if not method.mergeable:
        with pytest.raises(ValueError, match="w_0 can't be merged"):
            jlora.merge(adapted)
        return
    merged = jlora.merge(adapted)
    assert merged["w_0"].sharding == sharding, f"merged leaf has {merged['w_0'].sharding}, the base {sharding}"
    assert merged["other"] is base["other"], "a leaf that is not adapted was copied"
    for dtype in (jnp.bfloat16, jnp.float32):
        cast = {"w_0": problem.params["w_0"].astype(dtype)}
        shape = jax.eval_shape(lambda p: jlora.merge(adapt(p, problem.spec)), cast)["w_0"]
        assert (shape.dtype, shape.shape) == (dtype, (8, 8)), f"merged leaf is {shape}"
    lifted, gradient = jit(
        lambda a: (_outputs(problem, a), jax.grad(lambda p: _loss(jlora.merge(a.replace(params=p))["w_0"]))(a.params))
    )(adapted)
    close(problem.fn(merged, problem.x), lifted)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient)), "merge is not differentiable"


def check_learn(method):
    """A teacher of the same method is recovered; the optimizer's state and the params are legal carries of a scan."""
    problem = problems.plain(method)

    @jit
    def losses():
        student = problem.adapted
        targets = _outputs(problem, perturbed(student))
        tx = jlora.optimizer(student, optax.adam, learning_rate=0.03)

        def loss(p):
            return jnp.mean((_outputs(problem, student.replace(params=p)) - targets) ** 2)

        def step(carry, _):
            p, state = carry
            value, grads = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grads, state, p, **problems.observed(student))
            return (optax.apply_updates(p, updates), state), value

        return jax.lax.scan(step, (student.params, tx.init(student.params)), length=300)[1]

    first, last = np.asarray(losses())[[0, -1]]
    assert last < first / 50, f"the loss fell from {first} only to {last}"


def check_gradient(method):
    """After two steps every trained array has a gradient; base and frozen arrays are what they were."""
    problem = problems.plain(method)
    adapted = problem.adapted
    before = jax.device_get((adapted.base, adapted.frozen))

    @jit
    def gradients(adapted):
        def step(p, _):
            g = jax.grad(lambda p: _loss(_outputs(problem, adapted.replace(params=p))))(p)
            return jax.tree.map(lambda leaf, g: leaf - 0.1 * g, p, g), g

        return jax.lax.scan(step, adapted.params, length=3)[1]

    last = jax.tree.map(lambda steps: steps[-1], jax.device_get(gradients(adapted)))
    for keys, leaf in paths.flatten_with_keys(last)[0]:
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), f"{'/'.join(keys)} has a dead or infinite gradient"
    trained, frozen = (
        {keys for keys, _ in paths.flatten_with_keys(tree)[0]} for tree in (adapted.params, adapted.frozen)
    )
    assert not trained & frozen, f"trained and frozen at once: {trained & frozen}"
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves((adapted.base, adapted.frozen))))


def check_trace_once(method):
    """Steps with changing params, inputs and equal methods compile once."""
    problem = problems.plain(method)
    traces = []

    def fn(params, x):
        traces.append(1)
        return problem.fn(params, x)

    @jit
    def step(adapted, x):
        grads = jax.grad(lambda p: _loss(jlora.lift(fn)(adapted.replace(params=p), x)))(adapted.params)
        return adapted.replace(params=jax.tree.map(lambda leaf, g: leaf - 0.1 * g, adapted.params, grads))

    for again in range(2):  # a second life, as after loading
        adapted = problem.adapted.replace(plan=copy.deepcopy(problem.adapted.plan))
        for number in range(3):
            adapted = step(adapted, problem.x + number + again)
    assert len(traces) == 1, f"6 steps with equal methods traced {len(traces)} times"


def check_dtype(method):
    """bf16 and f32 go in and come out; adapters are float32 at least; no type is promoted in silence."""
    problem = problems.plain(method)

    def run(adapted):
        dtype = adapted.base["w_0"].dtype
        cast = problems.Problem(problem.fn, problem.params, problem.x.astype(dtype), problem.spec)
        other = perturbed(adapted)
        y, gradient = _value_and_gradient(lambda p: _outputs(cast, adapted.replace(params=p)), other.params)
        return adapted.params, gradient, y, problem.fn(by_hand(other), cast.x)

    with jax.numpy_dtype_promotion("strict"):
        starts = [
            adapt({"w_0": problem.params["w_0"].astype(dtype)}, problem.spec) for dtype in (jnp.bfloat16, jnp.float32)
        ]
        half, full = jit(lambda *starts: [run(start) for start in starts])(*starts)
    for dtype, (params, grads, y, merged) in ((jnp.bfloat16, half), (jnp.float32, full)):
        assert y.dtype == merged.dtype == dtype, f"{dtype} came out as {y.dtype}, merged as {merged.dtype}"
        for leaf, gradient in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
            assert leaf.dtype == gradient.dtype == jnp.float32, f"trained arrays of {dtype} are {leaf.dtype}"
    close(half[2], full[2], 0.05)
    close(half[3], full[3], 0.05)


def check_vmap(method):
    """Maps over keys and over adapters: each of the mapped is what it is alone."""
    problem = problems.plain(method)
    adapted = problem.adapted
    keys = jax.random.split(jax.random.key(3), 2)
    many = [perturbed(adapted, seed).params for seed in (4, 5)]

    def start(key):
        return problem.start(key).params

    def call(p):
        return _outputs(problem, adapted.replace(params=p))

    alone = jit(call)
    close(jax.vmap(start)(keys), _stacked([start(key) for key in keys]))
    close(jit(jax.vmap(call))(_stacked(many)), jnp.stack([alone(one) for one in many]))


def _stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def check_keys(method):
    """What is drawn differs from site to site and from layer to layer; what the method declares alike does not."""
    params = {name: problems.weight(seed, 3, 8, 8) for seed, name in enumerate("uv")}
    adapted = adapt(params, {"[uv]": jlora.Axes("batch in out", method)})
    for tree in (adapted.params, adapted.frozen):
        for name, u in tree.get("u", {}).items():
            matrices = [np.asarray(matrix) for leaf in (u, tree["v"][name]) for matrix in leaf]
            if name == getattr(method, "gate", None):
                continue  # given out, not drawn
            if name in method.alike or all(matrix.min() < matrix.max() for matrix in matrices):
                distinct = len({matrix.tobytes() for matrix in matrices})
                wanted = 1 if name in method.alike else len(matrices)
                assert distinct == wanted, f"{name} has {distinct} starts in {len(matrices)} layers, wanted {wanted}"


def check_mesh(method):
    """On eight devices, with bases cut along every axis, under `jit` and `shard_map`: as on one device, cut as the base is."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    cuts = {"rows_0": P("model", None), "columns_0": P(None, "model"), "both_0": P("data", "model")}
    if method.mergeable:  # what acts alone needs its whole input
        cuts |= {"manual_rows_0": cuts["rows_0"], "manual_columns_0": cuts["columns_0"]}
    manual = {"manual_rows_0": (P(None, "model"), P()), "manual_columns_0": (P(), P(None, "model"))}
    params = {name: problems.weight(seed, 8, 8) for seed, name in enumerate(cuts)}
    placed = {name: jax.device_put(leaf, NamedSharding(mesh, cuts[name])) for name, leaf in params.items()}
    start = adapt(placed, {".*": method})
    _check_cuts(start, mesh, cuts)

    def by_rows(x, w):
        return jax.lax.psum(x @ w, "model")

    def fn(params, x):
        for name in cuts:
            if name in manual:
                body, (x_cut, y_cut) = by_rows if name == "manual_rows_0" else jnp.matmul, manual[name]
                run = jax.shard_map(body, mesh=mesh, in_specs=(x_cut, cuts[name]), out_specs=y_cut)
                x = jnp.tanh(run(x, params[name]))
            else:
                x = jnp.tanh(x @ params[name])
        return x

    @jit
    def alone(adapted, x):
        written = by_hand(perturbed(adapted, size=problems.LAYERS_NOISE))
        for name in cuts:
            x = jnp.tanh(x @ written[name])
        return x

    x = problems.normal(9, 16, 8)
    y = jit(lambda a, x: jlora.lift(fn)(perturbed(a, size=problems.LAYERS_NOISE), x))(
        start, jax.device_put(x, NamedSharding(mesh, P("data")))
    )
    close(y, alone(*jax.device_put((start, x), jax.devices()[0])))
    for name, leaf in jlora.merge(start).items() if method.mergeable else ():
        assert leaf.sharding == placed[name].sharding, f"{name}: {leaf.sharding}"


def _check_cuts(adapted, mesh, cuts):
    """Every field's axes are cut as those axes of the base that they stand for, all others are whole; so is what is shared."""
    for leaf in jax.tree.leaves([tree.get(SHARED) for tree in (adapted.params, adapted.frozen)]):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P()), leaf.ndim), f"shared lies as {leaf.sharding}"
    for site in adapted.plan.sites:
        cut = dict(zip(("in", "out"), cuts[site.path], strict=True))
        fields = {**adapted.params[site.path], **adapted.frozen.get(site.path, {})}
        for name, field in fields.items():
            axes = site.method.axes[name]
            wanted = P(*(cut.get(role) for role in axes)) if site.method.matrix else cuts[site.path]
            got = field.sharding
            assert got.is_equivalent_to(NamedSharding(mesh, wanted), field.ndim), (
                f"{name} lies as {got}, wanted {wanted}"
            )


def check_lift(method):
    """A lifted model equals the hand-written one in values and gradients, whatever its weights look like."""
    _agree([problems.model(method)])


def check_labels(method):
    """Labels and axes name exactly the fields that there are, and LoRA+ builds from them."""
    adapted = problems.plain(method).adapted
    (site,) = adapted.plan.sites
    trained, frozen = adapted.params["w_0"], adapted.frozen.get("w_0", {})
    labels = method.labels(site)
    assert set(labels) == set(trained), f"labels name {sorted(labels)}, trained are {sorted(trained)}"
    assert set(labels.values()) <= set(GROUPS), f"unknown groups in {labels}"
    fields = {**trained, **frozen}
    always = set(method.axes) if not method.beside else set(fields)  # some fields only go with a leaf beside
    named = always - method.optional <= set(fields) <= set(method.axes)
    assert named, f"axes name {sorted(method.axes)}, the fields are {sorted(fields)}"
    for name, axes in ((name, method.axes[name]) for name in fields) if method.matrix else ():
        assert len(axes) == fields[name].ndim, f"{name} has shape {fields[name].shape} but axes {axes}"
        assert all(size == 8 for role, size in zip(axes, fields[name].shape) if role in ("in", "out")), (
            f"{name}: {axes}"
        )
    factors = {
        name: bool(jnp.any(leaf)) for name, leaf in trained.items() if leaf.ndim > 1 and labels[name] in ("a", "b")
    }
    if len(set(factors.values())) == 2:
        assert all((labels[name] == "a") == drawn for name, drawn in factors.items()), (
            f"of {sorted(factors)} those that start at zero are the b, got {labels}"
        )
    shared = [tree.get(SHARED, {}).get(type(method).__name__, {}) for tree in (adapted.params, adapted.frozen)]
    names = sorted([*shared[0], *shared[1]])
    assert sorted(method.shared_fields) == names, f"shared_fields name {method.shared_fields}, shared are {names}"
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=1e-2, ratio=16, embedding_learning_rate=1e-2)

    @jit
    def first_updates(p):
        return tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p, **problems.observed(adapted))[0]

    updates = jax.device_get(first_updates(adapted.params))
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates)), "LoRA+ leaves a field without update"


def check_io(method):
    """Saved and loaded adapters give the same output bit for bit; the files hold no base."""
    problem = problems.plain(method)
    other = jnp.zeros((256, 256))
    adapted = perturbed(problem.adapted.replace(base={**problem.adapted.base, "other": other}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters"
        jlora.save(path, adapted)
        loaded = jlora.load(path, {**problem.params, "other": other}).replace(context=adapted.context)
        written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert loaded.plan == adapted.plan, f"saved {adapted.plan}, loaded {loaded.plan}"
    outputs = jit(lambda *both: [_outputs(problem, each) for each in both])(loaded, adapted)  # one trace each
    assert np.array_equal(*outputs), "the loaded adapters give another output"
    assert written < other.nbytes, f"{written} bytes were written: the base is among them"


def check_count(method):
    """The number of trained values is the one that the docstring states."""
    for problem in problems.shapes(method)[:3]:
        rows, columns = problem.params["w_0"].shape
        start = jax.eval_shape(problem.start, jax.random.key(0)).params
        shared, trained = start.get(SHARED, {}), {name: tree for name, tree in start.items() if name != SHARED}
        for tree, sentence in ((trained, TRAINS), (shared, SHARES)):
            if tree or sentence.search(_doc(method)):
                found, stated = count(tree), stated_count(method, rows, columns, sentence)
                assert found == stated, f"{rows} x {columns}: {found} values are trained, the docstring says {stated}"
    if shared:
        found, stated = count(problems.stack(method).adapted.params[SHARED]), stated_count(method, 8, 8, SHARES, 3)
        assert found == stated, f"three matrices share {found} trained values, the docstring says {stated}"


TRAINS, SHARES = re.compile(r"Trains\s+`([^`]+)`\s+values"), re.compile(r"Shares\s+`([^`]+)`\s+trained\s+values")


def _doc(method):
    return type(method).__doc__ or ""


def stated_count(method, rows, columns, sentence=TRAINS, matrices=1):
    """The closed form of a docstring's sentence "Trains `...` values", in the method's hyperparameters, in and out.

    Of "Shares `...` trained values", which all leaves do together, in numbers of them too (see `shared_count_formula`).
    """
    found = sentence.search(_doc(method))
    assert found, f'{type(method).__name__}\'s docstring must have a sentence "{sentence.pattern}"'
    formula = re.sub(r'(?<!")\bin\b', "rows", re.sub(r'(?<!")\bout\b', "columns", " ".join(found[1].split())))
    names = {"rows": rows, "columns": columns, "kinds": 1, **dict.fromkeys(("matrices", "layers", "pairs"), matrices)}
    names["count"] = lambda inner: stated_count(inner, rows, columns, sentence, matrices)
    names["number"] = getattr(method, "number", None)
    known = {
        "len": len,
        "min": min,
        "max": max,
        "round": round,
        "sqrt": math.sqrt,
        "sum": sum,
        "map": map,
        "range": range,
    }
    # As globals, so that a lambda sees them.
    return eval(formula, {"__builtins__": {}, **known, **vars(method), **names})


def check_serialisation(method):
    """A method survives JSON, equals its copy, hashes by value, and can be read."""
    copied = jlora.method_from_dict(json.loads(json.dumps(jlora.method_to_dict(method))))
    assert copied == method, f"{method!r} came back as {copied!r}"
    assert hash(copied) == hash(method) == hash(copy.deepcopy(method)), "equal methods have different hashes"
    assert str(method).startswith(type(method).__name__ + "("), f"it prints as {method}"
