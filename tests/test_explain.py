"""What `explain` says of each method: complete for all there are, and its numbers counted by hand."""

import re

import jax
import jax.numpy as jnp
import pytest
from contract import discovery

import jlora
import jlora.methods
from jlora.core.protocol import docstrings
from jlora.core.tree.starts import blank

pytestmark = pytest.mark.once

FIRST = [
    cls.CASES[0]
    for module in discovery.modules()
    if discovery.is_public(module)
    for cls in discovery.methods_of(module)
]


def adapted(spec, **shapes):
    """The shapes of adapters; nothing is computed."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return jax.eval_shape(lambda params: jlora.adapterize(params, spec, prepared=blank(params, spec)), params)


@pytest.mark.parametrize("method", FIRST, ids=lambda method: type(method).__name__)
def test_every_method_is_explained_whole(method):
    start = adapted({"w_0": method}, w_0=(12, 8))  # some methods adapt no leaf without a layer
    text = jlora.explain(start)
    head, *lines = text.split("\n")
    assert head == f"{method}, 1 leaf"
    parts = dict(re.findall(r"^  (what|trains|costs|source) +(.*)$", text, re.MULTILINE))
    assert list(parts) == ["what", "trains", "costs", "source"] and all(parts.values())
    trained = sum(leaf.size for leaf in jax.tree.leaves(start.params))
    assert parts["trains"].startswith(f"{trained:,} values, ")
    assert re.search(r"\d|forward pass", parts["costs"], re.IGNORECASE)
    assert all(len(line) <= 120 for line in lines)
    assert "`" in docstrings.first_sentence(type(method)), "the first sentence of the docstring must have the formula"


def test_products_are_counted_of_what_the_method_gives_as_data():
    spec = {
        "stack": jlora.Axes("batch in out", jlora.LoRA(4)),
        "wide": jlora.LoRA(4),
        "rows": jlora.Axes("in out", jlora.LoRA(2), "gather"),
    }
    text = jlora.explain(adapted(spec, stack=(3, 12, 8), wide=(8, 20), rows=(100, 8)))
    one, two = text.split("\n\n")
    if "rank=2" in one:
        one, two = two, one
    more, own = 3 * 4 * (12 + 8) + 4 * (8 + 20), 3 * 12 * 8 + 8 * 20
    assert f"{more} multiply-adds more" in one and f"of the {own} of" in " ".join(one.split()) and "2 leaves" in one
    assert "16 multiply-adds more for each row of input (200 % of the 8" in " ".join(two.split()), (
        "a lookup has one product"
    )
    sparse = jlora.explain(adapted({"w": jlora.SHiRA("random", density=0.25)}, w=(12, 8)))
    assert "24 multiply-adds more" in sparse
    assert "A forward pass as the base's" in jlora.explain(adapted({"w": jlora.Full()}, w=(12, 8)))


def test_the_optimizers_state_is_counted_beside_adamws():
    steps, trained = 9, 3 * (12 + 8 + 1)
    history = 1 + 3 + (steps + 1) * 2  # the step, the mask of ranks, and rows of step and ranks
    history += 1 + 3 + 1  # steps that were skipped, the mask of closed gates, and how often those were found open
    text = jlora.explain(adapted({"w": jlora.AdaLoRA(3, 2, steps=steps)}, w=(12, 8)))
    assert f"beside AdamW's: {2 * trained + history} values" in " ".join(text.split())
    text = jlora.explain(adapted({"w": jlora.BeamLoRA(3, steps=steps, interval=2)}, w=(12, 8)))
    assert f"beside AdamW's: {3 * 3 * (12 + 8) + history} values" in " ".join(text.split())
    text = jlora.explain(adapted({"w": jlora.SoRA(3)}, w=(12, 8)))
    assert "not known yet (w: SoRA follows a schedule" in " ".join(text.split())


def test_a_docstring_is_taken_apart():
    class Method:
        """One thing: `w`. Another.

        Trains `rank * (in +
        out)` values a matrix. Costs a product
        more. Costs nothing else.

        Args:
            rank: Costs what it says.

        Reference:
            A 2020, arXiv:2001.00001; B, arXiv:2001.00001
            and arXiv:2002.00002.

        Raises:
            ValueError: never.
        """

    assert docstrings.first_sentence(Method) == "One thing: `w`."
    assert docstrings.count_formula(Method) == "rank * (in + out)"
    assert docstrings.costs(Method) == "Costs a product more. Costs nothing else."
    assert docstrings.reference(Method) == "A 2020, arXiv:2001.00001; B, arXiv:2001.00001 and arXiv:2002.00002."
    assert docstrings.papers(Method) == ["2001.00001", "2002.00002"]
    assert (
        docstrings.costs(jlora.Method)
        is docstrings.count_formula(jlora.Method)
        is docstrings.reference(jlora.Method)
        is None
    )
