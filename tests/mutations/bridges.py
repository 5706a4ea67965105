"""Faults in the models that hold their adapters: NNX modules and Linen modules."""

from mutations.mutation import Mutation

NNX, LINEN = "tests/test_nnx.py::test_", "tests/test_linen.py::test_"

MUTATIONS = (
    Mutation(
        "bridges: what a call writes into a model's variables is lost",
        "jlora/nnx.py",
        "if changed:",
        "if False:",
        (NNX + "what_a_call_writes_is_there_afterwards_and_is_not_the_given_models",),
    ),
    Mutation(
        "bridges: an adapted module writes into the given model's state",
        "jlora/nnx.py",
        "rest = jax.tree.map(lambda array: array, rest)",
        "rest = nnx.State(rest)",
        (NNX + "what_a_call_writes_is_there_afterwards_and_is_not_the_given_models",),
    ),
    Mutation(
        "bridges: the base has variables of its own, and is there twice after a step",
        "jlora/nnx.py",
        "params if own else adapted.base",
        "adapted.base",
        (NNX + "nnx_trains_the_adapters_alone_and_allocates_ranks",),
    ),
    Mutation(
        "bridges: constants of a method get a gradient",
        "jlora/nnx.py",
        "jax.tree.map(jax.lax.stop_gradient, _values(self._constants))",
        "_values(self._constants)",
        (NNX + "the_adapters_dropout_follows_train_and_eval_and_constants_get_no_gradient",),
    ),
    Mutation(
        "bridges: dropout of adapters stays on in evaluation",
        "jlora/nnx.py",
        "if self._rngs is not None and not self.deterministic:",
        "if self._rngs is not None:",
        (NNX + "the_adapters_dropout_follows_train_and_eval_and_constants_get_no_gradient",),
    ),
    Mutation(
        "bridges: other methods of a model must read every adapted leaf",
        "jlora/nnx.py",
        '{} if name == "__call__" else {"unread": "allow"}',
        "{}",
        (NNX + "an_unread_leaf_is_an_error_of_the_call_unless_allowed_and_none_of_other_methods",),
    ),
    Mutation(
        "bridges: a parameter that a call changes is lost",
        "jlora/nnx.py",
        "if variable.get_raw_value() is not before.get(path):",
        "if path not in before:",
        (NNX + "calls_whose_effects_would_be_lost_are_refused",),
    ),
    Mutation(
        "bridges: an attribute that a call changes is lost",
        "jlora/nnx.py",
        "if nnx.graphdef(self.base) != after:",
        "if after is None:",
        (NNX + "calls_whose_effects_would_be_lost_are_refused",),
    ),
    Mutation(
        "bridges: an optimizer of adapters takes the base's state too",
        "jlora/nnx.py",
        'if names != ["lora"]:',
        'if "lora" not in names:',
        (NNX + "what_can_not_be_adapted_is_refused",),
    ),
    Mutation(
        "bridges: the base of a Linen module gets gradients",
        "jlora/linen.py",
        'jax.lax.stop_gradient(self.get_variable("params", "base"))',
        'self.get_variable("params", "base")',
        (LINEN + "only_the_adapters_get_gradients_and_state_and_merged_params_give_the_same",),
    ),
    Mutation(
        "bridges: collections that a Linen call changes are lost",
        "jlora/linen.py",
        'self.put_variable(collection, "base", values)',
        "del values",
        (LINEN + "other_collections_and_random_streams_are_the_models_own",),
    ),
    Mutation(
        "bridges: a Linen call with other adapters than its variables hold goes on",
        "jlora/linen.py",
        "if wanted != found:",
        "if wanted is found:",
        (LINEN + "constants_are_a_collection_that_a_call_asks_for",),
    ),
)
