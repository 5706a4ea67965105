"""Faults in what learns one task after another, and in what is found of intruder dimensions."""

from mutations.mutation import Mutation

DUAL, ONLINE, SD = (f"tests/continual/test_{name}.py::test_" for name in ("duallora", "online", "sdlora"))
INTRUDERS = "tests/test_intruders.py::test_"
LOOP = ONLINE + "a_stream_is_that_of_the_authors_loop_in_one_compiled_program"

MUTATIONS = (
    Mutation(
        "a finished direction is kept without its length",
        "jlora/methods/sdlora.py",
        'start.params["b"] * length[..., None, None].astype(a.dtype)',
        'start.params["b"]',
        (SD + "a_whole_stream_is_that_of_numpy_compiled_once_and_continuous[paper]",),
    ),
    Mutation(
        "an absorbed direction takes nothing along",
        "jlora/methods/sdlora.py",
        "jnp.where(absorbed, magnitudes[task] * parts, 0)",
        "jnp.where(absorbed, parts, 0)",
        (SD + "a_direction_that_earlier_ones_make_up_goes_into_their_magnitudes[True]",),
    ),
    Mutation(
        "the orthogonal branch sees earlier tasks' inputs",
        "jlora/methods/duallora.py",
        'return params["a"] - f @ (f.T @ params["a"])',
        'return params["a"]',
        (DUAL + "what_inputs_of_an_earlier_task_give_does_not_move_while_the_next_is_learned",),
    ),
    Mutation(
        "importances are those of the last adapter alone",
        "jlora/continual/online.py",
        "(share * g + (1 - share) * x)",
        "(share * g + 0 * x)",
        (LOOP,),
    ),
    Mutation(
        "a plateau is told again while the loss stays",
        "jlora/continual/plateau.py",
        "armed & ~told, *last)",
        "armed, *last)",
        (ONLINE + "plateaus_are_told_once_until_the_loss_has_risen",),
    ),
    Mutation(
        "moments of a new task go on",
        "jlora/continual/next_task.py",
        "    opt_state = renewed(tx, opt_state, params, sites, Renewal(), key)\n",
        "",
        (SD + "moments_of_directions_begin_anew_and_those_of_magnitudes_go_on",),
    ),
    Mutation(
        "intruders are doubled where they should shrink",
        "jlora/analysis/intruders.py",
        "taken = (keep - 1) *",
        "taken = (1 - keep) *",
        (INTRUDERS + "intruders_are_those_of_loops_over_all_pairs_in_float64[out]",),
    ),
)
