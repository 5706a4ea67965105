"""`offload`: the steps of the optimizer inside, with a state that stays in the host's memory and comes group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import USUAL

import jlora
from jlora import _compat
from jlora.optimize import offload as module

BASE = {name: {"kernel": jnp.eye(8) + n} for n, name in enumerate("uvw")}


def adapted_by(method, base=BASE):
    return jlora.adapterize(base, {".*": method})


def lora(adapted):
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(clip, jlora.optimizer(adapted, optax.adamw, 1e-2, ratio=4, weight_decay=0.1))


def parts(adapted):
    return optax.MultiSteps(lora(adapted), 2)


ADALORA = jlora.AdaLoRA(rank=4, target=2, steps=6)
CASES = {"adamw": (jlora.LoRA(2), lora), "ranks": (ADALORA, lora), "parts": (ADALORA, parts)}


def step_of(tx):
    """Of a loss whose gradient is cheap to compile, and small, so that ranks differ."""

    def step(params, state):
        gradients = jax.tree.map(lambda value: jnp.cos(3 * value) * value, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def kinds(state):
    """The memory kinds of a state's arrays, and those of its scalars."""
    leaves = jax.tree.leaves(state)
    found = [{leaf.sharding.memory_kind for leaf in leaves if bool(leaf.ndim) == axes} for axes in (True, False)]
    return tuple(found)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def course(tx, adapted, **options):
    """The first state, and params and state after six jitted steps, which are one program where they donate."""
    step = jax.jit(step_of(tx), compiler_options=USUAL, **options)
    params = jax.device_put(jax.tree.map(jnp.copy, adapted.params), jax.devices()[0])
    first = state = tx.init(params)
    for _ in range(6):
        params, state = step(params, state)
    assert step._cache_size() == 1 or not options
    return first, params, state


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_optimizer_and_the_state_stays_on_the_host(name):
    method, make = CASES[name]
    adapted = adapted_by(method)
    _, *plain = course(make(adapted), adapted)
    given, *found = course(jlora.offload(make(adapted), group_bytes=1), adapted, donate_argnums=(0, 1))
    same(found, plain)
    assert jax.tree.structure(found[1]) == jax.tree.structure(plain[1])
    assert kinds(found[1]) == ({"pinned_host"}, {"device"})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    if method is ADALORA:
        assert jlora.ranks(adapted, found[1]) == jlora.ranks(adapted, plain[1])
        assert sum(jlora.rank_history(adapted, found[1]).ranks[-1]) == 6


def test_a_state_begins_on_the_host_and_goes_through_eager_steps():
    adapted = adapted_by(jlora.LoRA(2))
    tx = jlora.offload(lora(adapted))
    state = tx.init(adapted.params)
    assert kinds(state) == kinds(jax.jit(tx.init)(adapted.params)) == ({"pinned_host"}, {"device"})
    plain = step_of(lora(adapted))(adapted.params, lora(adapted).init(adapted.params))
    found = step_of(tx)(adapted.params, state)
    same(found, plain)
    assert kinds(found[1]) == ({"pinned_host"}, {"device"})


def test_on_a_mesh_and_in_a_scan_the_state_lies_beside_the_trained_arrays():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    base = {
        name: {"kernel": jax.device_put(leaf["kernel"], NamedSharding(mesh, P("data", "model")))}
        for name, leaf in BASE.items()
    }
    adapted = adapted_by(ADALORA, base)
    tx = jlora.offload(lora(adapted), group_bytes=1)
    state = tx.init(adapted.params)
    moments = state[1].inner.inner_states["a"].inner_state[0].mu
    assert moments["u"]["kernel"]["a"].sharding.spec == P("data")
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state) if leaf.ndim)
    turns = lambda tx: jax.jit(lambda *given: jax.lax.scan(lambda c, _: (step_of(tx)(*c), None), given, None, 3)[0])
    found = turns(tx)(adapted.params, state)
    same(found, turns(lora(adapted))(adapted.params, lora(adapted).init(adapted.params)))
    assert kinds(found[1]) == ({"pinned_host"}, {"device"})


def moves(tx, params):
    """What the live equations of an update do to groups, in their order: F fetches an array, S sends one, | waits."""
    closed = jax.make_jaxpr(lambda *given: tx.update(*given))(params, tx.init(params), params)
    letters = []
    for eqn in _compat.live(_compat.open_jaxpr(closed)[0]).eqns:
        if eqn.primitive.name == "device_put":
            letters.append("S" if eqn.params["devices"][0] == jax.memory.Space.Host else "F")
        elif eqn.primitive.name == "optimization_barrier":
            letters.append("|")
    return "".join(letters)


@pytest.mark.parametrize(("size", "wanted"), [(1, "FFSS|FFSS|FFSS"), (1024, "FFFFSSSS|FFSS"), (2**20, "FFFFFFSSSSSS")])
def test_a_group_is_sent_back_before_the_next_is_fetched(size, wanted):
    params = {name: jnp.ones((8, 8)) for name in "abc"}  # 512 bytes of moments each
    assert moves(jlora.offload(optax.adamw(1e-3), group_bytes=size), params) == wanted


def test_what_an_optimizer_leaves_as_it_is_is_not_fetched():
    idle = optax.GradientTransformation(lambda params: jax.tree.map(jnp.ones_like, params), lambda g, s, p=None: (g, s))
    assert moves(jlora.offload(idle), {"a": jnp.ones((8, 8))}) == ""


def test_the_program_of_a_step_takes_and_gives_the_state_in_host_memory():
    adapted = adapted_by(jlora.LoRA(2))
    tx = jlora.offload(lora(adapted))
    state = tx.init(adapted.params)
    program = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(adapted.params, state).compile().as_text()
    given, _, made = program.partition("entry_computation_layout=")[2].splitlines()[0].partition("->")
    arrays = sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state))
    # XLA's memory space 5 is the host's.
    assert given.count("S(5)") == made.count("S(5)") == arrays == 12


def test_a_restart_prunes_a_state_on_the_host_and_leaves_it_there():
    adapted = adapted_by(jlora.Chain(jlora.LoRA(2), links=3, prune=0.5, by="magnitude"))
    ends = []
    for tx in (lora(adapted), jlora.offload(lora(adapted))):
        params, state = jax.jit(step_of(tx))(adapted.params, tx.init(adapted.params))
        ends.append(jlora.restart(adapted.replace(params=params), state, tx, jax.random.key(1)))
    same(ends[1], ends[0])
    assert kinds(ends[1][1]) == ({"pinned_host"}, {"device"})


def test_a_round_of_alora_moves_ranks_and_moments_of_a_state_on_the_host():
    adapted = adapted_by(jlora.ALoRA(2, max_rank=4, pruned=1, steps=9, interval=3))
    loss = lambda adapted, x: jnp.sum(jnp.tanh(jlora.merge(adapted)["u"]["kernel"] @ x))
    ends = []
    for tx in (lora(adapted), jlora.offload(lora(adapted))):
        given = jax.tree.map(jnp.copy, adapted)
        params, state = jax.jit(step_of(tx))(given.params, tx.init(given.params))
        ends.append(jlora.reallocate(given.replace(params=params), state, tx, loss, jnp.ones(8), jax.random.key(1)))
    same(ends[1], ends[0])
    assert kinds(ends[1][1]) == ({"pinned_host"}, {"device"})
    assert set(jlora.ranks(adapted, ends[1][1]).values()) != {2}


def test_what_cannot_work_is_refused(monkeypatch):
    adapted = adapted_by(ADALORA)
    tx, params = jlora.offload(optax.adamw(1e-3)), {"a": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r"offload: \[0\].mu\['a'\] of the optimizer's state is not in the memory kind 'pinned_host'"
    ):
        tx.update(params, optax.adamw(1e-3).init(params), params)
    with pytest.raises(ValueError, match="jlora.offload inside it hides the moments that it reads; put it around"):
        jlora.with_rules(adapted, tx).init(adapted.params)
    with pytest.raises(ValueError, match="offload wants a positive group_bytes, got 0"):
        jlora.offload(optax.adamw(1e-3), group_bytes=0)
    monkeypatch.setattr(module, "HOST", "paged")
    with pytest.raises(
        ValueError,
        match="'paged', which the backend 'cpu' lacks .it has 'device', 'pinned_host', 'unpinned_host'.: use",
    ):
        tx.init(params)
