"""Specs: what a pattern hits, and one clear sentence for everything that is wrong with one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

LORA = jlora.LoRA(rank=2)
PARAMS = {
    "layer": {"q": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, "k": {"kernel": jnp.ones((6, 4))}},
    "stack": jnp.ones((3, 6, 6)),
    "table": jnp.ones((5, 2), jnp.int32),
}


def refused(spec, error, *parts, params=PARAMS, **options):
    """Asserts that a spec is refused, and that the sentence says all the parts."""
    with pytest.raises(error) as caught:
        jlora.adapterize(params, spec, **options)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def paths_of(adapted):
    return [site.path for site in adapted.plan.sites]


def test_the_first_match_wins_none_freezes_and_what_nothing_matches_is_frozen():
    spec = {r".*/k/kernel": None, r".*/kernel": LORA, r".*/bias": jlora.Full()}
    adapted = jlora.adapterize(PARAMS, spec)
    assert paths_of(adapted) == ["layer/q/bias", "layer/q/kernel"]
    assert jax.tree.structure(adapted.params) == jax.tree.structure(
        {"layer": {"q": {"kernel": {"a": 0, "b": 0}, "bias": {"w": 0}}}}
    )
    assert adapted.base["stack"] is PARAMS["stack"]


def test_a_pattern_must_match_the_whole_path():
    refused(
        {r"kernel": LORA}, ValueError, "'kernel' matches no leaf", "whole path", "'layer/q/kernel'", "'layer/k/kernel'"
    )
    refused({r"layer/q": LORA}, ValueError, "'layer/q' matches no leaf", "whole path")


def test_a_pattern_that_matches_nothing_names_the_nearest_paths():
    refused(
        {r"layer/q/kernal": LORA}, ValueError, "'layer/q/kernal' matches no leaf", "nearest paths are 'layer/q/kernel'"
    )


def test_a_wrong_regex_is_named_with_its_fault():
    refused({r"layer/(q/kernel": LORA}, ValueError, "'layer/(q/kernel' is no regular expression", "position 6")


def test_a_pattern_whose_leaves_are_all_taken_says_to_put_it_first():
    spec = {r".*/kernel": LORA, r".*/q/kernel": jlora.LoRA(rank=1)}
    refused(spec, ValueError, "every leaf that '.*/q/kernel' matches is taken by a pattern before it; put it first")


def test_a_rank_above_the_sides_names_path_shape_and_the_largest_rank():
    refused(
        {r".*/q/kernel": jlora.LoRA(rank=5)}, ValueError, "layer/q/kernel, shape (6, 4)", "rank 5 is above the smaller side",
        "6 x 4", "use rank 4 or less, or jlora.Full()",
    )  # fmt: skip


def test_dora_passes_the_refusal_of_its_inner_method_on():
    refused({r".*/q/kernel": jlora.DoRA(jlora.LoRA(rank=5))}, ValueError, "layer/q/kernel", "rank 5 is above")


def test_a_leaf_of_integers_is_refused():
    refused({"table": LORA}, TypeError, "table, shape (5, 2), holds int32; only floating-point leaves can be adapted")
    refused({"table": jlora.Full()}, TypeError, "table, shape (5, 2), holds int32")


def test_a_vector_is_refused_by_a_method_for_matrices():
    refused({r".*/bias": LORA}, ValueError, "layer/q/bias, shape (4,)", "adapts a matrix", "jlora.Full()")


def test_axes_that_cannot_be_known_are_an_error_that_shows_how_to_name_them():
    refused(
        {"stack": LORA}, ValueError, "stack, shape (3, 6, 6)", "which of its 3 axes are contracted",
        "sites=jlora.sites(fn, params, ...)", 'jlora.Axes("batch in out", LoRA(rank=2',
    )  # fmt: skip


def test_named_axes_need_no_trace():
    adapted = jlora.adapterize(PARAMS, {"stack": jlora.Axes("batch out in", LORA)})
    (site,) = adapted.plan.sites
    assert (site.in_axes, site.out_axes, site.batch_axes) == ((2,), (1,), (0,))
    assert jax.tree.map(jnp.shape, adapted.params) == {"stack": {"a": (3, 6, 2), "b": (3, 2, 6)}}


def test_named_axes_of_another_number_are_refused():
    refused({"stack": jlora.Axes("in out", LORA)}, ValueError, "stack has 3 axes, shape (3, 6, 6)", "name 2: 'in out'")


@pytest.mark.parametrize("roles", ["in", "out out", "in out rows", ""])
def test_roles_are_three_words(roles):
    with pytest.raises(
        ValueError,
        match=re.escape(f'roles are words "in", "out" and "batch", with in and out among them; got {roles!r}'),
    ):
        jlora.Axes(roles, LORA)


def test_axes_are_for_a_method():
    with pytest.raises(
        TypeError, match="Axes are for a method, or a code of quantize, such as jlora.LoRA\\(8\\); got None"
    ):
        jlora.Axes("in out", None)


def test_a_kind_of_axes_is_one_of_three():
    with pytest.raises(ValueError, match='kind must be "dot", "gather" or "conv", got "?\'lookup\''):
        jlora.Axes("in out", LORA, kind="lookup")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (r".*/kernel", ("a spec maps patterns to methods", "got str")),
        ([(r".*/kernel", LORA)], ("a spec maps patterns to methods", "got list")),
        (
            {r".*/kernel": jlora.LoRA},
            ("spec entry '.*/kernel' must be a method such as jlora.LoRA(8), or None; got <class",),
        ),
        ({r".*/kernel": 8}, ("spec entry '.*/kernel' must be a method", "got 8")),
        ({3: LORA}, ("a pattern is a regex string or jlora.ALL_LINEAR, got 3",)),
        ({re.compile(".*/kernel"): LORA}, ("a pattern is a regex string or jlora.ALL_LINEAR",)),
    ],
)
def test_a_spec_of_the_wrong_kind_is_refused(spec, parts):
    refused(spec, TypeError, *parts)


def test_all_linear_without_a_trace_says_how_to_get_one():
    refused({jlora.ALL_LINEAR: LORA}, ValueError, "ALL_LINEAR needs to know", "pass sites=jlora.sites(fn, params, ...)")


def test_all_linear_that_finds_nothing_is_an_error():
    params = {"scale": jnp.ones((4, 4))}
    report = jlora.sites(lambda p, x: x * p["scale"], params, jnp.ones((4, 4)))
    refused(
        {jlora.ALL_LINEAR: LORA},
        ValueError,
        "ALL_LINEAR found no weight that is contracted",
        params=params,
        sites=report,
    )


def test_all_linear_that_is_left_with_nothing_is_an_error():
    params, x = {"w": jnp.ones((4, 4)), "head": jnp.ones((4, 2))}, jnp.ones((1, 4))
    report = jlora.sites(lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"], params, x)
    spec = {"w": LORA, jlora.ALL_LINEAR: LORA}
    refused(spec, ValueError, "ALL_LINEAR was left with nothing by the patterns before it", params=params, sites=report)


def test_two_leaves_with_the_same_path_are_refused():
    params = {"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}
    refused(
        {"a/b": jlora.LoRA(rank=1)}, ValueError, "two leaves of the params tree have the same path 'a/b'", params=params
    )


def test_a_leaf_below_another_leaf_is_refused():
    params = {"a": {"b": jnp.ones((2, 2))}, "a/b": {"scale": jnp.ones(2)}}
    refused(
        {"a/b": jlora.LoRA(rank=1)}, ValueError, "the path 'a/b/scale' continues the path of another", params=params
    )


def test_every_leaf_gets_its_own_random_values_whatever_else_is_adapted():
    both = jlora.adapterize(PARAMS, {r".*/kernel": LORA}).params["layer"]
    alone = jlora.adapterize(PARAMS, {r".*/k/kernel": LORA}).params["layer"]
    other_key = jlora.adapterize(PARAMS, {r".*/k/kernel": LORA}, key=jax.random.key(1)).params["layer"]
    assert not np.array_equal(both["q"]["kernel"]["a"], both["k"]["kernel"]["a"])
    assert np.array_equal(both["k"]["kernel"]["a"], alone["k"]["kernel"]["a"])
    assert not np.array_equal(other_key["k"]["kernel"]["a"], alone["k"]["kernel"]["a"])


def test_old_and_new_style_keys_do_the_same():
    spec = {r".*/k/kernel": LORA}
    new, old = (jlora.adapterize(PARAMS, spec, key=key).params for key in (jax.random.key(7), jax.random.PRNGKey(7)))
    assert np.array_equal(new["layer"]["k"]["kernel"]["a"], old["layer"]["k"]["kernel"]["a"])


def test_the_params_that_are_given_stay_what_they_were():
    before = jax.device_get(PARAMS)
    adapted = jlora.adapterize(PARAMS, {r".*/kernel": LORA})
    assert all(
        mine is theirs for mine, theirs in zip(jax.tree.leaves(adapted.base), jax.tree.leaves(PARAMS), strict=True)
    )
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(PARAMS)))


def test_the_summary_names_path_shape_roles_method_and_count():
    spec = {
        r".*/q/kernel": jlora.LoRA(rank=2, alpha=16),
        "stack": jlora.Axes("batch in out", LORA),
        r".*/bias": jlora.Full(),
    }
    adapted = jlora.adapterize(PARAMS, spec)
    lines = jlora.summary(adapted).splitlines()
    assert lines[0].split() == ["leaf", "shape", "in", "x", "out", "method", "trained"]
    assert "layer/q/bias" in lines[1] and "Full()" in lines[1] and lines[1].endswith(" 4")
    assert "layer/q/kernel" in lines[2] and "6 x 4" in lines[2] and "LoRA(rank=2, alpha=16)" in lines[2]
    assert "stack" in lines[3] and "3 of 6 x 6" in lines[3] and lines[3].endswith(" 72")
    assert lines[4] == "trained 96 of 170 values in the base (56.47 %)"
    assert repr(adapted) == "Adapted(3 sites, 96 trained values on 170)"
