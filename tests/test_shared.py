"""Trained arrays that the leaves of a method share: where they are, what reads them, what their gradients are."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import checks, discovery
from contract.problems import by_hand, close, jit, normal, perturbed, weight
from contract.sharing import Alone, Common
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.core.tree.adapted import SHARED
from jlora.optimize.optimizer import labels

COMMON = Common()
CHECKS = discovery.checks(checks)
FIRST = {"check_agree", "check_labels", "check_count"}


@pytest.mark.parametrize("method", [Common(), Alone()], ids=str)
@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=() if check in FIRST else pytest.mark.long) for check in CHECKS]
)
def test_methods_that_share_trained_arrays_keep_the_contract(check, method):
    CHECKS[check](method)


def two(method=COMMON, other=None):
    params = {"u": weight(0, 8, 12), "v": weight(1, 12, 8)}
    return perturbed(jlora.adapterize(params, {"u": method, "v": other or method}))


def mlp(params, x):
    return jnp.tanh(x @ params["u"]) @ params["v"]


@pytest.mark.once
def test_they_lie_once_among_what_is_trained_and_reach_every_leaf_by_name():
    adapted = two()
    assert jax.tree.map(jnp.shape, adapted.params) == {
        "u": {"d": (2,)},
        "v": {"d": (2,)},
        SHARED: {"Common": {"a": (12, 2), "b": (2, 12)}},
    }
    assert jax.tree.map(jnp.shape, adapted.frozen) == {SHARED: {"Common": {"c": ()}}}
    assert two(Alone()).params["u"] == {}
    x = normal(3, 5, 8)
    close(jlora.lift(mlp, strict=True)(adapted, x), mlp(by_hand(adapted), x))


@pytest.mark.once
def test_their_gradient_is_the_sum_over_leaves_that_have_copies_of_their_own():
    adapted, x = two(), normal(3, 5, 8)

    def copied(copies):
        params = {}
        for site, drawer in zip(adapted.plan.sites, copies, strict=True):
            part = adapted.replace(params={**adapted.params, SHARED: {"Common": drawer}})
            params[site.path] = by_hand(part)[site.path]
        return jnp.sum(jnp.sin(mlp(params, x)))

    drawer = adapted.params[SHARED]["Common"]
    apart = jax.grad(copied)([drawer, drawer])
    wanted = jax.tree.map(jnp.add, *apart)
    found = jax.grad(loss(mlp))(adapted.params, adapted, x)
    close(found[SHARED]["Common"], wanted)


def walked(params, x):
    """Scan with remat, a loop, a branch, and a product under `shard_map`."""
    x = lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["stack"])[0]
    x = lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ params["loop"]), x)
    x = lax.cond(x[0, 0] > 0, lambda x: x @ params["branch"], lambda x: 2 * x @ params["branch"], x)
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    body = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P(), P(None, "model")), out_specs=P(None, "model"))
    return body(x, params["cut"])


@pytest.mark.parametrize("local", [frozenset(), frozenset({"in", "out"})], ids=["formed", "entered"])
def test_loops_branches_checkpoints_and_shards_give_the_gradients_of_the_written_weights(local, monkeypatch):
    # Of rank 1 in its columns, so that a shard's part of `b` needs no place: `b` is the same for every column.
    monkeypatch.setattr(Alone, "local", local)
    params = {
        "stack": weight(0, 3, 8, 8),
        **{name: weight(n, 8, 8) for n, name in enumerate(("loop", "branch", "cut"))},
    }
    adapted = perturbed(
        jlora.adapterize(params, {"stack": jlora.Axes("batch in out", Alone()), ".*": Alone()}), size=0.1
    )
    drawer = adapted.params[SHARED]["Alone"]
    drawer = {**drawer, "b": jnp.broadcast_to(drawer["b"][:, :1], drawer["b"].shape)}
    adapted, x = adapted.replace(params={**adapted.params, SHARED: {"Alone": drawer}}), normal(9, 4, 8)

    def both(function):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(function(adapted.replace(params=p)))))(adapted.params)

    found, wanted = jit(lambda: (both(lambda a: jlora.lift(walked)(a, x)), both(lambda a: walked(by_hand(a), x))))()
    if local:  # a shard sees the first columns of `b`, whatever its place
        found[1][SHARED]["Alone"]["b"], wanted[1][SHARED]["Alone"]["b"] = (
            jnp.sum(tree[1][SHARED]["Alone"]["b"], axis=1) for tree in (found, wanted)
        )
    close(found, wanted)


def explicit(params, x):
    hidden = jnp.tanh(jnp.dot(x, params["u"], out_sharding=P("data", "model")))
    return jnp.dot(hidden, params["v"], out_sharding=P("data", None))


def loss(fn):
    return lambda p, adapted, x: jnp.sum(jnp.sin(jlora.lift(fn)(adapted.replace(params=p), x)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_they_lie_whole_and_give_what_one_device_gives(kind, tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)
    params = {"u": weight(0, 8, 12), "v": weight(1, 12, 8)}
    cut = {"u": P("data", "model"), "v": P("model", None)}
    placed = {name: jax.device_put(leaf, NamedSharding(mesh, cut[name])) for name, leaf in params.items()}
    x = normal(3, 4, 8)
    alone = perturbed(jlora.adapterize(params, {".*": Alone()}))
    with jax.set_mesh(mesh):
        adapted = jlora.adapterize(placed, {".*": Alone()})
        whole = NamedSharding(mesh, P())
        assert all(leaf.sharding == whole for leaf in jax.tree.leaves((adapted.params, adapted.frozen)))
        adapted = adapted.replace(params=jax.device_put(alone.params, whole))
        spread = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = jax.jit(jax.value_and_grad(loss(explicit if kind == AxisType.Explicit else mlp)))(
            adapted.params, adapted, spread
        )
        jlora.save(tmp_path / "adapters", adapted)
        loaded = jlora.load(tmp_path / "adapters", placed)
    close(found, jax.jit(jax.value_and_grad(loss(mlp)))(alone.params, alone, x))
    assert jax.tree.structure(loaded) == jax.tree.structure(adapted)
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves((loaded.params, loaded.frozen)))
    specs = jlora.mesh.logical_axes(adapted, cut)
    assert set(jax.tree.leaves(specs.params, is_leaf=lambda x: isinstance(x, P))) == {P()}


@pytest.mark.once
def test_two_methods_of_one_class_have_drawers_of_their_own_also_in_an_adapted_base():
    adapted = two(Common(2), Common(3))
    assert jax.tree.map(jnp.shape, adapted.params[SHARED]) == {
        "Common": {"a": (8, 2), "b": (2, 12)},
        "Common_1": {"a": (12, 3), "b": (3, 8)},
    }
    x = normal(3, 5, 8)
    outer = perturbed(jlora.adapterize(adapted, {"base/u": Common(2), "base/v": Alone()}), seed=7)
    merged = by_hand(adapted)
    again = outer.replace(base=merged, plan=jlora.adapterize(merged, {"u": Common(2), "v": Alone()}).plan)
    again = again.replace(params={**outer.params["base"], SHARED: outer.params[SHARED]})
    close(jlora.lift(mlp)(outer, x), mlp(by_hand(again), x))
    close(jlora.merge(outer), by_hand(again))


@pytest.mark.once
def test_they_are_saved_loaded_and_counted_once(tmp_path):
    for name, adapted, own in (
        ("common", two(), 4),
        ("alone", two(Alone()), 0),
        ("mixed", two(Alone(), jlora.LoRA(2)), 40),
    ):
        jlora.save(tmp_path / name, adapted)
        loaded = jlora.load(tmp_path / name, adapted.base)
        assert jax.tree.structure(loaded) == jax.tree.structure(adapted)
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, adapted.params))
        size = 40 if name == "mixed" else 48
        drawer = f"{SHARED}/{type(adapted.plan.sites[0].method).__name__}"
        rows = {line.split()[0]: line.split()[-1] for line in jlora.summary(adapted).splitlines()}
        assert rows[drawer] == str(size) and f"trained {size + own} of" in jlora.summary(adapted)
    told = jlora.explain(two())
    assert "52 values, rank a matrix, 48 of them shared by all leaves (rank * (in + out))" in told


@pytest.mark.once
def test_files_that_name_a_drawer_of_no_method_are_refused(tmp_path):
    jlora.save(tmp_path / "x", two())
    file = tmp_path / "x" / "jlora.json"
    file.write_text(file.read_text().replace('"Common",\n    "a"', '"Other",\n    "a"'))
    with pytest.raises(ValueError, match="no described leaf has an array params/~shared/Other/a"):
        jlora.load(tmp_path / "x", two().base)


@pytest.mark.once
def test_the_optimizer_gives_them_their_groups_and_rates():
    adapted = two()
    assert labels(adapted)[SHARED] == {"Common": {"a": "a", "b": "b"}}
    tx = jlora.optimizer(adapted, optax.sgd, 0.1, ratio=8)
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    updates = tx.update(ones, tx.init(adapted.params), adapted.params)[0]
    found = {name: float(-leaf.ravel()[0]) for name, leaf in updates[SHARED]["Common"].items()}
    assert found == pytest.approx({"a": 0.05, "b": 0.8}) and float(-updates["u"]["d"][0]) == pytest.approx(0.8)


@pytest.mark.once
def test_the_contract_rejects_another_number_of_shared_values_than_the_docstring_s():
    @dataclass(frozen=True)
    class Miscounted(Alone):
        """Trains `0` values. Shares `rank * in + out` trained values."""

    @dataclass(frozen=True)
    class Uncounted(Alone):
        """Trains `0` values."""

    for method in (Miscounted(), Uncounted()):
        with pytest.raises(AssertionError, match="trained"):
            checks.check_count(method)


@pytest.mark.once
def test_a_shared_array_without_a_group_is_an_error():
    class Unlabelled(Common):
        def shared_labels(self, trained):
            return {"a": "a"}

    with pytest.raises(ValueError, match=r"~shared/Unlabelled/b: .* no learning-rate group: .* shared_labels"):
        jlora.optimizer(two(Unlabelled()), optax.sgd, 0.1)


@pytest.mark.once
def test_rules_for_some_sites_leave_them_to_the_optimizer():
    adapted = two(Common(), jlora.AdaLoRA(2, 1, steps=4, start_steps=1, final_steps=1))
    tx = jlora.optimizer(adapted, optax.adam, 0.1)
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    updates = jax.jit(tx.update)(ones, tx.init(adapted.params), adapted.params)[0]
    close(updates[SHARED]["Common"]["b"], jnp.full((2, 12), -0.1))


@pytest.mark.once
def test_arrays_that_are_not_those_it_names_are_refused():
    class Misnamed(Common):
        shared_fields = ("a", "b")

    with pytest.raises(ValueError, match=r"shares \['a', 'b'\] trained and \['c'\] frozen, but its shared_fields name"):
        jlora.adapterize({"w": weight(0, 8, 8)}, {"w": Misnamed()})


@pytest.mark.once
def test_a_restart_refuses_them_and_so_does_a_chain():
    adapted = two(Common(), jlora.LoRA(2))
    tx = jlora.optimizer(adapted, optax.adam, 0.1)
    state = tx.init(adapted.params)
    with pytest.raises(
        ValueError, match="u: Common.* trains arrays that its leaves share, which no leaf can begin anew"
    ):
        jlora.restart(adapted, state, tx, jax.random.key(1))
    with pytest.raises(TypeError, match="factors of its own"):
        jlora.Chain(Common())
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    _, state = tx.update(ones, state, adapted.params)
    moved, restarted = jlora.restart(adapted, state, tx, jax.random.key(1), sites=adapted.plan.sites[1:], donate=False)
    close(moved.params[SHARED], adapted.params[SHARED])
    # Their step counts go on with their moments: the second of two equal steps is as long as the first.
    updates, _ = tx.update(ones, restarted, moved.params)
    wanted, _ = tx.update(ones, state, adapted.params)
    close([updates[SHARED], updates["u"]], [wanted[SHARED], wanted["u"]], 1e-6)


@pytest.mark.once
def test_compact_keeps_them_and_an_export_is_the_same_function(tmp_path):
    adapted = two(Common(), jlora.AdaLoRA(2, 1, steps=4))
    small = jlora.compact(adapted)
    assert jax.tree.structure(small.params[SHARED]) == jax.tree.structure(adapted.params[SHARED])
    close(by_hand(small), by_hand(adapted))
    names = {"(?P<m>u|v)": "{m}"}
    jlora.save_peft(tmp_path / "peft", two(), names)
    close(jlora.merge(jlora.load_peft(tmp_path / "peft", two().base, names)), by_hand(two()))


@pytest.mark.once
def test_observed_and_mapped_over_adapters_they_are_as_ever():
    adapted, x = two(Alone()), normal(3, 5, 8)
    output, seen = jlora.observe(mlp, jlora.input_norms)(adapted, x)
    close(output, mlp(by_hand(adapted), x))
    close(seen["u"], jnp.linalg.norm(x, axis=0))
    many = [perturbed(adapted, seed).params for seed in (5, 6)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    found = jax.vmap(lambda p: jlora.lift(mlp)(adapted.replace(params=p), x))(stacked)
    close(found, jnp.stack([mlp(by_hand(adapted.replace(params=p)), x) for p in many]))
