"""Faults in many runs at once: what each has of its own, what is held, and how their products are planned."""

from mutations.mutation import Mutation

STACK = "tests/test_stack.py::test_"
ALONE = STACK + "runs_of_other_ranks_scales_starts_rates_decays_and_data_are_each_what_they_are_alone[lora]"
SWEEP = "tests/training/test_sweep.py::test_"

MUTATIONS = (
    Mutation(
        "the products of runs are planned as those of one",
        "jlora/core/products/contraction.py",
        "fewer = 1 if runs == 1 else OF_RUNS",
        "fewer = 1",
        (STACK + "products_of_runs_form_no_weight_for_each_where_one_alone_does",),
    ),
    Mutation(
        "a run that is held goes on",
        "jlora/core/transforms/each_run.py",
        "jnp.where(stopped, old, new)",
        "jnp.where(stopped, new, new)",
        (STACK + "a_held_run_and_its_optimizer_stay_as_they_are_to_the_bit_while_others_go_on",),
    ),
    Mutation(
        "runs of other scales have that of the first",
        "jlora/core/protocol/scaled.py",
        "b=view.frozen[GAIN] * inner.b",
        "b=inner.b",
        (ALONE,),
    ),
    Mutation(
        "constants of the first run stand for all",
        "jlora/core/tree/stacked.py",
        "all(_equal(leaf, tree[keys]) for tree in others)",
        "True",
        (STACK + "constants_that_all_runs_have_are_held_once_and_others_for_each",),
    ),
    Mutation(
        "bases that differ in values are taken for one",
        "jlora/core/tree/stacked.py",
        "if not _equal(leaf, theirs[keys]):",
        "if leaf.shape != theirs[keys].shape:",
        (STACK + "what_is_no_run_of_the_same_program_is_refused",),
    ),
    Mutation(
        "runs of a sweep have the batch of the first seed",
        "jlora/training/sweep/trainer.py",
        "order = [self._seeds.index(each.seed) for each in self.runs]",
        "order = [0 for _ in self.runs]",
        (SWEEP + "each_run_of_a_sweep_is_what_it_is_alone",),
    ),
)
