"""Faults in the rules of the studies."""

from mutations.mutation import Mutation

RULES = "tests/experiments/test_rules.py::test_"

MUTATIONS = (
    Mutation(
        "a study with results gets its criterion afterwards",
        "experiments/criteria.py",
        "        if runs:\n",
        "        if False:\n",
        (RULES + "a_criterion_is_written_first_and_doesnt_change",),
    ),
    Mutation(
        "seeds that choose a rate are reported",
        "experiments/criteria.py",
        'if both := {each["seed"] for each in chosen} & {each["seed"] for each in runs}:',
        "if both := set():",
        (RULES + "a_plan_that_breaks_a_rule_is_told_which",),
    ),
    Mutation(
        "a grid grows at the wrong end",
        "experiments/grids.py",
        "lowest = best(losses) == rates[0]",
        "lowest = best(losses) != rates[0]",
        (RULES + "a_grid_grows_to_an_inner_optimum_or_to_its_limit_which_is_told",),
    ),
    Mutation(
        "the error of a mean over tasks is that of their sum",
        "experiments/ruling.py",
        "float(np.sqrt(shares.sum()) / len(shares))",
        "float(np.sqrt(shares.sum()))",
        (RULES + "one_test_over_tasks_is_students_for_one_and_welchs_for_two",),
    ),
    Mutation(
        "a doubtful side reproduces a claim",
        "experiments/ruling.py",
        'if low > 0 and "above" not in doubted:',
        "if low > 0:",
        (RULES + "a_verdict_sees_zero_and_the_papers_effect",),
    ),
)
