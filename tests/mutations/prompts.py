"""Faults in prompts: where virtual tokens stand, what they read, and what comes back."""

from mutations.mutation import Mutation

PROMPTED = "tests/prompts/test_prompted.py::test_"
LONG = "tests/models/test_model_long.py::test_"

MUTATIONS = (
    Mutation(
        "virtual tokens have the wrong rows",
        "jlora/core/walk/lookup.py",
        "number = indices[..., 0] - size\n",
        "number = indices[..., 0] - size - 1\n",
        (PROMPTED + "a_prompt_of_real_rows_is_the_text_in_front",),
    ),
    Mutation(
        "real tokens keep the positions of virtual ones",
        "jlora/prompts/prompted.py",
        "places.spread(array + number, 0)",
        "places.spread(array, 0)",
        (PROMPTED + "every_packed_text_has_its_prompt",),
    ),
    Mutation(
        "only the first packed text has a prompt",
        "jlora/prompts/inserting.py",
        "    return (segments != 0) & (segments != before)",
        "    return (segments == 1) & (segments != before)",
        (PROMPTED + "places_of_packed_texts_are_those_by_hand",),
    ),
    Mutation(
        "groups see ahead",
        "jlora/models/s2.py",
        "        seen &= jnp.tri(group, dtype=bool)",
        "        seen &= jnp.tri(group, k=1, dtype=bool)",
        (LONG + "no_token_sees_one_behind_it",),
    ),
    Mutation(
        "no heads are shifted",
        "jlora/models/s2.py",
        "group // 2 * n, causal",
        "0 * n, causal",
        (LONG + "both_formulations_are_the_formula",),
    ),
)
