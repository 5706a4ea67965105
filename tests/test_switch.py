"""`switch`: sparse adapters in a fused base, in place and back, bit for bit."""

import functools
import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import jit, model_function, normal, perturbed, weight
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.compose.switch import _read, _write

pytestmark = pytest.mark.once

SHAPES = {
    "embedding_0": (9, 8),
    "heads_0": (8, 2, 4),
    "output_0": (2, 4, 8),
    "stack": (2, 8, 8),
    "convolution_0": (3, 8, 8),
}
SHAPES |= {"up_0": (8, 8)}
X = normal(9, 2, 5, 8)


def base(dtype=jnp.float32):
    """Leaves of every kind, new ones each time, since a switch uses them up."""
    return {name: weight(n, *shape).astype(dtype) for n, (name, shape) in enumerate(SHAPES.items())}


SITES = jlora.sites(model_function, base(), X)


@functools.cache
def adapter(seed=0, dtype=jnp.float32, pattern=".*", **options):
    spec = {pattern: jlora.SHiRA(**{"mask": "random", "density": 0.2, **options})}
    return perturbed(jit(lambda: jlora.adapterize(base(dtype), spec, jax.random.key(seed), SITES))(), seed)


merged = jit(jlora.merge)


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_pack_in_place_is_the_merged_base_and_goes_away_without_a_trace(dtype):
    adapted = adapter(dtype=dtype)
    before, wanted = bits(adapted.base), bits(merged(adapted))
    params, saved = jlora.switch(base(dtype), jlora.pack(adapted))
    assert bits(params) == wanted != before
    assert bits(jlora.restore(params, saved)) == before


def test_one_pack_replaces_another_that_shares_entries_with_it():
    first, second = adapter(0), adapter(1)
    params, saved = jlora.switch(base(), jlora.pack(first))
    params, saved = jlora.switch(params, jlora.pack(second), saved)
    assert bits(params) == bits(merged(second))
    assert bits(jlora.restore(params, saved)) == bits(base())


def test_leaves_are_overwritten_in_place_and_others_stay_the_same_objects():
    params, pack = base(), jlora.pack(adapter(pattern="up_0|stack"))
    place = params["stack"].unsafe_buffer_pointer()
    changed, _ = jlora.switch(params, pack)
    assert changed["stack"].unsafe_buffer_pointer() == place
    assert params["up_0"].is_deleted()
    assert changed["heads_0"] is params["heads_0"]


def test_no_copy_of_a_leaf_is_made_on_the_way():
    w = {"w": normal(0, 256, 256)}
    pack = jlora.pack(jlora.adapterize(w, {"w": jlora.SHiRA(density=0.01)}))
    for program in (_read, _write):
        memory = program.lower(w, pack).compile().memory_analysis()
        assert memory.temp_size_in_bytes < w["w"].nbytes / 4


def test_packs_of_equal_sizes_share_one_program():
    params = base()
    for offset in (0, 1, 2):
        params, saved = jlora.switch(params, jlora.pack(adapter(offset=offset, pattern="up_0", density=0.11)))
        params = jlora.restore(params, saved)
        compiled = _write._cache_size() if offset == 0 else compiled  # noqa: F821
    assert _write._cache_size() == compiled


def test_fused_adapters_are_the_weighted_sum_of_their_updates():
    few, strengths = "up_0|stack|heads_0", [0.5, -1.25, 2.0]
    adapters = [adapter(0, pattern=few), adapter(1, pattern=few, density=0.3), adapter(2, pattern="up_0")]
    fused, _ = jlora.switch(base(), jlora.fuse(adapters, strengths))
    alone = [merged(each) for each in adapters]
    for name, leaf in base().items():
        updates = [s * (each[name] - leaf) for s, each in zip(strengths, alone)]
        np.testing.assert_allclose(fused[name], leaf + sum(updates), atol=1e-5)


def test_fusing_disjoint_adapters_is_switching_them_one_after_another_in_any_order():
    adapters = [adapter(3, pattern="up_0|stack", offset=offset) for offset in (0, 1)]
    fused, _ = jlora.switch(base(), jlora.fuse(adapters))
    for order in (adapters, adapters[::-1]):
        params = base()
        for each in order:
            params, _ = jlora.switch(params, jlora.pack(each))
        assert bits(params) == bits(fused)


def test_a_mesh_keeps_its_shardings_and_moves_no_weight():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    cuts = {"stack": P(None, "data", "model"), "up_0": P("model", None)}
    spec = {"stack": jlora.Axes("batch in out", jlora.SHiRA(density=0.2)), "up_0": jlora.SHiRA(density=0.2)}

    def placed():
        return {name: jax.device_put(base()[name], NamedSharding(mesh, cut)) for name, cut in cuts.items()}

    adapted = perturbed(jlora.adapterize(placed(), spec))
    pack, wanted = jlora.pack(adapted), bits(merged(adapted))
    written, read = (each.lower(placed(), pack).compile().as_text() for each in (_write, _read))
    assert "scatter" in written
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", written)
    assert not re.search("all-gather|all-to-all|collective-permute", read)
    params, saved = jlora.switch(placed(), pack)
    assert bits(params) == wanted
    assert all(params[name].sharding == leaf.sharding for name, leaf in placed().items())
    assert bits(jlora.restore(params, saved)) == bits(placed())


def test_interference_is_the_norm_and_the_zeros_of_the_updates_product():
    first, second = (adapter(seed, pattern="up_0|stack") for seed in (0, 1))
    found = jlora.interference(first, second)
    assert set(found) == {"up_0", "stack"}
    d1, d2 = (np.asarray(merged(each)["stack"] - base()["stack"]) for each in (first, second))
    product = d1 @ d2.transpose(0, 2, 1)
    np.testing.assert_allclose(found["stack"][0], np.linalg.norm(product, 2, axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["stack"][1], 1 - np.count_nonzero(product, axis=(1, 2)) / 64)


def test_disjoint_struct_adapters_disturb_each_other_less_than_lora():
    w = {"w": weight(0, 64, 64)}
    struct = [perturbed(jlora.adapterize(w, {"w": jlora.SHiRA("struct", rank=2, offset=n)}), n) for n in (0, 1)]
    lora = [perturbed(jlora.adapterize(w, {"w": jlora.LoRA(2)}, jax.random.key(n)), n) for n in (0, 1)]
    (_, zeros), (_, lora_zeros) = (jlora.interference(*pair)["w"] for pair in (struct, lora))
    assert lora_zeros == 0 < zeros


def test_what_does_not_fit_is_refused_before_anything_changes():
    params, pack = base(), jlora.pack(adapter(pattern="up_0"))
    with pytest.raises(ValueError, match="the params have no leaf up_0, which the pack changes"):
        jlora.switch({"down": params["up_0"]}, pack)
    with pytest.raises(
        ValueError, match=r"up_0 has shape \(8, 8\) and dtype bfloat16; the pack was made for \(8, 8\), float32"
    ):
        jlora.switch(base(jnp.bfloat16), pack)
    assert not params["up_0"].is_deleted()


def test_methods_that_change_every_entry_and_adapters_that_differ_are_refused():
    up = {"up_0": base()["up_0"]}
    for method in (jlora.LoRA(2), jlora.DoRA(jlora.SHiRA()), jlora.Full()):
        with pytest.raises(
            ValueError, match=r"up_0: .* changes more than a few entries; pack adapters of SHiRA alone, or merge"
        ):
            jlora.pack(jlora.adapterize(up, {"up_0": method}))
    other = jlora.adapterize({"up_0": normal(0, 4, 4)}, {"up_0": jlora.SHiRA()})
    with pytest.raises(ValueError, match="up_0: the adapters have it as .* and as"):
        jlora.fuse([jlora.adapterize(up, {"up_0": jlora.SHiRA()}), other])
    with pytest.raises(ValueError, match="a strength for each, got 1 and 2"):
        jlora.fuse([other], [1.0, 2.0])


@pytest.mark.once
def test_the_benchmark_writes_its_table_its_numbers_and_its_plot(tmp_path):
    path = Path(__file__).parents[1] / "experiments" / "benchmarks" / "switch_time.py"
    runpy.run_path(str(path))["main"](["--sizes", "32,64", "--rank", "4", "--repeats", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "switch_time.json").read_text())["rows"]
    assert [(row["size"], row["entries"], row["equal_rank"]) for row in rows] == [(32, 10, 1), (64, 41, 1)]
    assert all(ratio > 0 for row in rows for ratio in row["ratios"].values())
    assert "The paper says 5 to 16 times" in (tmp_path / "switch_time.md").read_text()
    assert (tmp_path / "switch_time.png").stat().st_size > 1000
