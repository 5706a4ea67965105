"""The code behind the table of pod programs, on small programs for eight CPU devices."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.models import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"))
import hlo
import tpu_programs

pytestmark = pytest.mark.once

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    remat=True,
)


@pytest.fixture(scope="module")
def rows():
    devices = jax.devices()[:8]
    assert len(devices) == 8
    programs = [
        tpu_programs.Program("8b", "v5e:4x4", 2, kind, rank=3, length=20) for kind in ("bound", "jlora", "full")
    ]
    return [tpu_programs.measure(program, SMALL, devices) for program in programs]


def test_products_and_collectives_in_a_loop_count_once_for_each_trip():
    mesh = tpu_programs.make_mesh(jax.devices()[:8], 2)
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    scanned = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])
    module = hlo.Module(scanned.lower(x, w).compile().as_text())
    tally = module.tally()
    assert tally.flops == 5 * 2 * 2 * 32 * 32
    assert module.tally(loops=False).flops == 2 * 2 * 32 * 32
    gathered = [count for (kind, _, size), count in tally.collectives.items() if kind == "all-gather" and size == 4096]
    assert sum(gathered) == 5


def test_bytes_without_loops_are_what_xla_counts():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 32)))
    compiled = jax.jit(lambda a, b: jnp.tanh(a @ b) @ b.T).lower(a, b).compile()
    ours = hlo.Module(compiled.as_text()).tally()
    assert ours.bytes == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.05)
    assert ours.flops == 2 * 2 * 64 * 128 * 32


@pytest.mark.long
def test_the_lora_program_sums_no_frozen_weights_gradient_and_full_fine_tuning_does(rows):
    bound, lora, full = rows
    assert tpu_programs.weight_gradients(lora, bound) == []
    assert tpu_programs.weight_gradients(full, bound)
    assert bound["flops"] < lora["flops"] < full["flops"]


@pytest.mark.long
def test_heads_as_many_as_a_multiple_of_the_rank_do_not_hide_what_the_bound_sums_too(rows):
    """A gather that is written as a sum, once with the heads apart and once not, is no gradient."""
    bound, lora, _ = rows
    with_sums = lambda row, shape, size: {
        **row,
        "collectives": [{"kind": "all-reduce", "shape": shape, "bytes": size, "count": 5}],
    }
    apart, joined = with_sums(bound, "f32[12, 32, 32]", 4096), with_sums(lora, "f32[384, 32]", 4096)
    sized = {**joined, "leaves": {"w": [384, 32]}}
    assert tpu_programs.weight_gradients(sized, apart) == []
    assert tpu_programs.weight_gradients(sized, {**apart, "collectives": []}) == [
        "5 sums of 12,288 values, the bound has 0"
    ]


@pytest.mark.long
def test_the_table_has_a_line_for_each_program_and_the_verdicts_have_numbers(rows):
    text = tpu_programs.table(rows)
    lines = text.splitlines()
    assert len(lines) == 2 + len(rows) and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "fsdp 4 x tensor 2, jlora" in lines[3] and "| yes |" in lines[3]
    sentences = tpu_programs.verdicts(rows)
    assert len(sentences) == 3 and "fits with 0.00 GB" in sentences[0] and "collectives" in sentences[2]
    assert "no collective carries the gradient of a frozen weight" in sentences[1]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.long
def test_a_program_above_a_chips_memory_does_not_fit(rows):
    large = {**rows[1], "total_bytes": 17e9}
    assert not tpu_programs.fits(large) and "| NO |" in tpu_programs.table([large])


def test_a_tensor_axis_that_does_not_divide_the_chips_is_refused():
    with pytest.raises(ValueError, match="tensor=3 does not divide 8 chips"):
        tpu_programs.make_mesh([SimpleNamespace()] * 8, 3)
