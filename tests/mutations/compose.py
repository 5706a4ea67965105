"""Faults in what makes one adapter of several."""

from mutations.mutation import Mutation

BANK = "tests/test_bank.py::test_"
COMBINE = "tests/test_combine.py::test_"
SUM = (COMBINE + "factors_side_by_side_are_the_sum_of_the_changes",)
HUB = "tests/test_lorahub.py::test_"
MERA = "tests/test_mera.py::test_"
METEORA, XLORA = "tests/test_meteora.py::test_", "tests/test_xlora.py::test_"
MILORA = "tests/test_milora.py::test_"
ZIP = "tests/test_ziplora.py::test_"
PEFT = COMBINE + "what_peft_makes_of_three_adapters"
PLACE = "jlora/compose/combine.py"
MUTATIONS = (
    Mutation("side by side forgets a scale", PLACE, "jnp.concatenate([size * a for", "jnp.concatenate([a for", SUM),
    Mutation("closed gates are open", PLACE, "(one.a * one.gates[..., None, :], one.b)", "(one.a, one.b)", SUM),
    Mutation(
        "a weight below 0 turns both factors",
        PLACE,
        '"b": _by_rule(way.rule, b, roots, keys[1])',
        '"b": _by_rule(way.rule, b, signed, keys[1])',
        (PEFT + "[linear]",),
    ),
    Mutation(
        "the weighted arrays elect the sign",
        "jlora/compose/election.py",
        "votes = kept if",
        "votes = weights * kept if",
        (PEFT + "[ties]",),
    ),
    Mutation(
        "random pruning does not make up for what it drops",
        "jlora/compose/election.py",
        "arrays / self.density, 0)",
        "arrays, 0)",
        (COMBINE + "pruning_keeps_so_many_and_random_pruning_keeps_the_mean",),
    ),
    Mutation(
        "bases are not compared",
        PLACE,
        "            if not same:",
        "            if False:",
        (COMBINE + "what_cannot_be_combined_is_refused",),
    ),
    Mutation(
        "weights go to the adapters in the order of a leaf's members",
        PLACE,
        "amounts[jnp.array([one.order for one in members])]",
        "amounts[: len(members)]",
        (COMBINE + "a_leaf_that_some_leave_alone_is_combined_from_the_others",),
    ),
    Mutation(
        "LoraHub begins beside the base",
        "jlora/compose/lorahub.py",
        "else np.zeros(size)",
        "else np.full(size, 0.1)",
        (HUB + "the_points_tried_are_those_of_the_authors_optimizer",),
    ),
    Mutation(
        "LoraHub's weights beyond a bound are left there",
        "jlora/compose/lorahub.py",
        "inside = _reflected(point, bound)",
        "inside = np.array(point)",
        (HUB + "a_search_makes_all_its_steps_within_its_bounds",),
    ),
    Mutation(
        "LoraHub's weights multiply one factor alone",
        "jlora/compose/lorahub.py",
        "name: jnp.tensordot(weights.astype(side.dtype), side, 1)",
        'name: jnp.tensordot(weights if name == "a" else jnp.ones_like(weights), side, 1)',
        (HUB + "the_update_is_quadratic_in_the_weights",),
    ),
    Mutation(
        "MerA moves the neurons of one side the other way",
        "jlora/compose/mera.py",
        "matches @ network",
        "matches.mT @ network",
        (MERA + "permuted_networks_merge_to_the_function_that_they_all_are[options0]",),
    ),
    Mutation(
        "MerA matches by one side alone",
        "jlora/compose/mera.py",
        '[jnp.concatenate([each["d"].mT, each["u"]], axis=-1) for each',
        '[each["d"].mT for each',
        (MERA + "unlike_networks_are_averaged_after_the_cheapest_matching",),
    ),
    Mutation(
        "MerA forgets a learned scale",
        "jlora/compose/mera.py",
        '"u": fields["u"] * scale}',
        '"u": fields["u"]}',
        (MERA + "permuted_networks_merge_to_the_function_that_they_all_are[options0]",),
    ),
    Mutation(
        "ZipLoRA's gains are not used",
        "jlora/compose/ziplora.py",
        "(gain[..., None] * one.scale * one.a",
        "(one.scale * one.a",
        (ZIP + "gains_multiply_the_input_features_of_each_adapter",),
    ),
    Mutation(
        "ZipLoRA's parents forget their scale",
        "jlora/compose/ziplora.py",
        "gain[..., None] * one.scale * one.a",
        "gain[..., None] * one.a",
        (ZIP + "gains_multiply_the_input_features_of_each_adapter",),
    ),
    Mutation(
        "ZipLoRA's penalty lets signs cancel where the code does not",
        "jlora/compose/ziplora.py",
        "jnp.abs(met).mean(-1)",
        "jnp.abs(met.mean(-1))",
        (ZIP + "the_penalty_is_that_of_the_paper_or_of_its_code",),
    ),
    Mutation(
        "ZipLoRA compares with the first adapter alone",
        "jlora/compose/ziplora.py",
        "fn(self.parent(number), x)",
        "fn(self.parent(0), x)",
        (ZIP + "the_objective_is_zero_where_each_does_alone_what_all_do_and_training_lowers_it",),
    ),
    Mutation(
        "the first adapter of a bank takes the place of none",
        "jlora/compose/bank.py",
        "bank._write(name, len(bank._slots) + 1, bank._placed(name, entry))",
        "bank._write(name, len(bank._slots), bank._placed(name, entry))",
        (BANK + "adapters_come_and_go_without_compilation_and_growth_alone_compiles",),
    ),
    Mutation(
        "in a convolution a row of an unknown slot gets the base",
        "jlora/core/products/slots.py",
        "jnp.where(known[:, None], slot[:, None] == jnp.arange(len(a)), jnp.nan)",
        "jnp.where(known[:, None], slot[:, None] == jnp.arange(len(a)), 0.0)",
        (BANK + "rows_choose_in_convolutions[NHWC-NHWC-1]",),
    ),
    Mutation(
        "in feature groups a row's numbers reach the first group alone",
        "jlora/core/walk/convolution.py",
        "jnp.tile(scale, y.shape[feature] // max(scale.shape[1], 1))",
        "jnp.pad(scale, ((0, 0), (0, y.shape[feature] - scale.shape[1])))",
        (BANK + "rows_choose_in_convolutions[NHWC-NCHW-2]",),
    ),
    Mutation(
        "a bank that grows numbers its kinds anew",
        "jlora/compose/kinds.py",
        "            found[fewer] = kind\n",
        "            found = [*found[:fewer], *found[fewer + 1 :], kind]\n",
        (BANK + "rows_may_have_adapters_that_hold_no_factors",),
    ),
    Mutation(
        "a bank that grows fills sparse adapters up with the first position",
        "jlora/compose/kinds.py",
        "        if old != new:\n",
        "        if False:\n",
        (BANK + "rows_may_have_adapters_that_hold_no_factors",),
    ),
    Mutation(
        "one slot of another kind has the weight of the base",
        "jlora/core/products/by_kind.py",
        "mine = self.kind[slot] == n",
        "mine = self.kind[slot] < 0",
        (BANK + "one_slot_without_factors_has_a_weight",),
    ),
    Mutation(
        "a slot beyond the bank is its last",
        "jlora/core/products/slots.py",
        'mode="fill", fill_value=jnp.nan, wrap_negative_indices=False',
        'mode="clip"',
        (BANK + "a_traced_slot_that_is_none_of_the_banks_gives_nan",),
    ),
    Mutation(
        "the trial of a bank passes every function",
        "jlora/compose/bank.py",
        "    if not np.all(apart <= bound):\n",
        "    if False:\n",
        (BANK + "the_set_up_check_finds_models_that_move_the_batch_axis_or_mix_rows",),
    ),
    Mutation(
        "what a removed adapter was stays in its slot",
        "jlora/compose/bank.py",
        "        self._overwrite(self._slot(name), {})\n",
        "",
        (BANK + "adapters_come_and_go_without_compilation_and_growth_alone_compiles",),
    ),
    Mutation(
        "what several products of a matrix say is mixed up",
        "jlora/core/walk/taps.py",
        "    if total > count:\n",
        "    if False:\n",
        ("tests/test_aux.py::test_a_matrix_that_several_products_use_is_refused_and_one_that_none_uses_has_nan",),
    ),
    Mutation(
        "what a call is told does not reach the steps of a loop",
        "jlora/core/walk/weight.py",
        'whole["context"] = weight.context',
        'whole["context"] = {}',
        (
            "tests/test_aux.py::test_what_a_call_is_told_and_what_methods_say_go_through_scan_remat_unrolled_layers_and_vmap",
        ),
    ),
    Mutation(
        "a token's place in its slot's blocks is counted over all slots",
        "jlora/core/products/of_tokens.py",
        "(jnp.cumsum(counts) - counts)[by_slot]",
        "jnp.zeros_like(by_slot)",
        (METEORA + "three_ways_give_one_result_and_gradients_alone_and_under_vmap",),
    ),
    Mutation(
        "a token's gate is held against its own label",
        "jlora/losses/gates.py",
        "wanted = labels[:, 1:] if shift",
        "wanted = labels[:, :-1] if shift",
        (METEORA + "the_loss_of_gates_leaves_out_what_asks_nothing_and_gives_nan_for_what_is_no_slot",),
    ),
    Mutation(
        "adapters that a mixture trains have their scales twice",
        "jlora/compose/mixtures/experts.py",
        '            new["b"] = new["b"] / new["scale"][..., None, None]\n',
        "",
        (METEORA + "outputs_gradients_and_ten_steps_are_those_of_the_authors_formulas[all-2-1.0-True-0.5]",),
    ),
    Mutation(
        "the matrices of every leaf begin with the first numbers",
        "jlora/compose/mixtures/xlora.py",
        "            first += count\n",
        "",
        (XLORA + "each_matrix_of_a_stack_takes_its_own_numbers_for_each_token",),
    ),
    Mutation(
        "the first pass goes on from the cache of the second",
        "jlora/compose/mixtures/two_passes.py",
        "Caches(first, second)",
        "Caches(second, second)",
        (XLORA + "texts_written_with_a_cache_for_both_passes_are_those_that_are_read_whole",),
    ),
    Mutation(
        "what is told in a body is known after it",
        "jlora/core/walk/interpreter.py",
        "told, self.notes = self.notes, dict(self.notes)",
        "told = self.notes",
        (MILORA + "what_has_no_answer_is_refused",),
    ),
    Mutation(
        "a prompt is pooled with what is no prompt",
        "jlora/compose/mixtures/milora.py",
        "jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))",
        "jax.nn.softmax(scores)",
        (MILORA + "ten_steps_are_those_by_hand_under_scan_and_remat[straight_through]",),
    ),
)
