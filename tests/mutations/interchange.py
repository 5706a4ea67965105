"""Faults on the way to PEFT's format and back."""

from mutations.mutation import Mutation

FROM = "tests/interchange/test_from_peft.py::test_"
HOSTILE = "tests/interchange/test_hostile_files.py::test_"
INVARIANTS = "tests/interchange/test_invariants.py::test_"
MADE_UP = "tests/interchange/test_made_up_kinds.py::test_"
NAMES = "tests/interchange/test_names.py::test_"
PROFILES = "tests/interchange/test_profiles.py::test_"
STATED = "tests/interchange/test_stated_kinds.py::test_"
READS = "tests/interchange/test_as_peft_reads.py::test_"
COMPUTES = FROM + "an_adapter_of_peft_computes_what_peft_computes"
SAME_BYTES = FROM + "an_adapter_of_peft_goes_out_with_the_same_bytes"
COMES_BACK = FROM + "what_jlora_holds_otherwise_goes_out_and_comes_back_as_the_same_function"

IN = (
    Mutation(
        "rsLoRA's scale is read as LoRA's",
        "jlora/interchange/kinds/read_lora.py",
        "scale = alpha / (rank**0.5 if rslora else rank) * (2 if inner else 1)",
        "scale = alpha / rank * (2 if inner else 1)",
        (COMPUTES,),
    ),
    Mutation(
        "an attention's out_proj counts once",
        "jlora/interchange/kinds/read_lora.py",
        " * (2 if inner else 1)",
        "",
        (READS + "attentions_out_proj_counts_twice_as_in_peft_and_has_the_attentions_rank_and_alpha",),
    ),
    Mutation(
        "fused q, k and v have the scale of the first",
        "jlora/interchange/kinds/read_lora.py",
        "part.b if ratio == 1 else part.b * b.dtype.type(ratio)",
        "part.b",
        (READS + "fused_q_k_and_v_with_different_alphas_come_in_as_one_leaf",),
    ),
    Mutation(
        "layers of other scales have the commonest one",
        "jlora/interchange/kinds/read_lora.py",
        "b = part.b if part.scale == scale else part.b * part.b.dtype.type(part.scale / scale)",
        "b = part.b",
        (NAMES + "layers_of_different_ranks_and_scales_become_one_stack",),
    ),
    Mutation(
        "a bias behind B misses its scale",
        "jlora/interchange/kinds/read_lora.py",
        "folder.read_as(str(one.bias), dtype)) * dtype.type(one.scale)",
        "folder.read_as(str(one.bias), dtype))",
        (COMPUTES,),
    ),
    Mutation(
        "factors that were taken out of the base are read as plain ones",
        "jlora/interchange/kinds/read_lora.py",
        '    if not settings.init.startswith(("pissa", "olora")):\n        return method\n',
        "    return method\n",
        (COMPUTES, INVARIANTS + "16_adapters_taken_from_the_weight_go_out_as_plain_lora_of_twice_the_rank"),
    ),
    Mutation(
        "tied weights that were adapted differently are read",
        "jlora/interchange/kinds/read_lora.py",
        "return one.scale == other.scale and all(",
        "return True or all(",
        (READS + "tied_weights_that_an_adapter_changes_differently_are_refused",),
    ),
    Mutation(
        "layers without DoRA have a magnitude of zero",
        "jlora/interchange/kinds/read_lora.py",
        "            found[at] = np.asarray(column_norms(jnp.asarray(folded[at])))\n",
        "            pass\n",
        (NAMES + "layers_without_a_magnitude_have_the_norms_of_the_base",),
    ),
    Mutation(
        "patterns of alphas are ignored",
        "jlora/interchange/files/config.py",
        'self._pattern("alpha_pattern", target,',
        'self._pattern("rank_pattern", target,',
        (READS + "patterns_of_ranks_and_alphas_hit_the_modules_that_they_hit_in_peft",),
    ),
    Mutation(
        "a pattern matches the beginning of a name",
        "jlora/interchange/files/patterns.py",
        "return len(name) in _Matcher(name, parsed.state.flags).sequence(parsed, {0})",
        "return bool(_Matcher(name, parsed.state.flags).sequence(parsed, {0}))",
        (READS + "a_pattern_matches_what_pefts_rule_matches",),
    ),
    Mutation(
        "a pattern may take for ever",
        "jlora/interchange/files/patterns.py",
        "            if self.steps > MOST_STEPS:\n                raise",
        "            if False:\n                raise",
        (READS + "a_pattern_that_would_take_too_long_is_refused",),
    ),
    Mutation(
        "a manifest of other tensors passes",
        "jlora/interchange/files/manifest.py",
        'if found["sha256"] != sha256(tensors):',
        "if False:",
        (HOSTILE + "a_manifest_of_other_tensors_is_refused",),
    ),
    Mutation(
        "settings that were edited pass",
        "jlora/interchange/files/manifest.py",
        "        if config.get(name) != value:\n",
        "        if False:\n",
        (HOSTILE + "settings_that_were_edited_are_refused_with_both_values",),
    ),
    Mutation(
        "a leaf that shares a tensor gets the ranks of all",
        "jlora/interchange/files/recorded.py",
        'return slice(*line["ranks"])',
        "return slice(None)",
        (NAMES + "leaves_that_are_columns_of_one_parameter_are_joined_and_come_back_as_they_were",),
    ),
)

OUT = (
    Mutation(
        "integers become numbers of 16 bits",
        "jlora/interchange/save.py",
        'return tensor if tensor.dtype.kind in "iu" else tensor.astype(dtype)',
        "return tensor.astype(dtype)",
        (PROFILES + "integers_stay_integers_in_16_bits",),
    ),
    Mutation(
        "adapters that are not finite are written",
        "jlora/interchange/save.py",
        'if tensor.dtype.kind in "iu" or (finite := np.isfinite(tensor)).all():',
        'if tensor.dtype.kind in "iu" or (finite := np.ones(tensor.shape, bool)).all():',
        (PROFILES + "adapters_that_are_not_finite_are_refused_by_their_path",),
    ),
    Mutation(
        "an array without a place is left out in silence",
        "jlora/interchange/save.py",
        "            if (path, name) not in told:\n",
        "            if False:\n",
        (PROFILES + "a_trained_array_without_a_place_is_an_error",),
    ),
    Mutation(
        "the memory of a strided array is written",
        "jlora/interchange/files/written.py",
        "self.tensors[key] = np.ascontiguousarray(tensor)",
        "self.tensors[key] = tensor",
        (PROFILES + "an_array_that_is_not_contiguous_is_written_by_its_values",),
    ),
    Mutation(
        "two leaves may write one tensor",
        "jlora/interchange/files/written.py",
        "        if key in self.tensors:\n",
        "        if False:\n",
        (NAMES + "two_leaves_that_write_one_tensor_are_refused",),
    ),
    Mutation(
        "factors from the weight go out with the scale of their rank",
        "jlora/methods/lora.py",
        "alpha * (2**0.5 if root else 2)",
        "alpha",
        (INVARIANTS + "16_adapters_taken_from_the_weight_go_out_as_plain_lora_of_twice_the_rank",),
    ),
    Mutation(
        "SHiRA's scale is lost on the way out",
        "jlora/methods/shira.py",
        "values = values if self.scale == 1 else values * values.dtype.type(self.scale)",
        "pass",
        (PROFILES + "the_scale_of_entries_goes_out_in_their_values",),
    ),
    Mutation(
        "a class that changes the weight goes out by its parent's factors",
        "jlora/compose/plain.py",
        "not (is_own(type(method)) or _agrees(method, found, weight))",
        "False",
        (
            PROFILES + "a_derived_class_ships_what_it_computes_and_not_what_its_parent_would",
            PROFILES + "a_derived_class_without_factors_of_its_weight_is_refused_or_goes_out_by_its_weight",
        ),
    ),
    Mutation(
        "a truncation has all of the singular values in both factors",
        "jlora/compose/plain.py",
        "root = np.sqrt(s[:rank])",
        "root = s[:rank]",
        (PROFILES + "a_truncation_is_the_best_of_its_rank_and_says_what_is_lost",),
    ),
    Mutation(
        "a truncation's residual is the square of it",
        "jlora/compose/plain.py",
        "residual[index] = np.sqrt(np.sum(s[rank:] ** 2)) / total",
        "residual[index] = np.sum(s[rank:] ** 2) / total",
        (PROFILES + "a_truncation_is_the_best_of_its_rank_and_says_what_is_lost",),
    ),
    Mutation(
        "for servers the scale stays outside of B",
        "jlora/interchange/leaves/pieces.py",
        "b = np.pad(_scaled(piece), ",
        "b = np.pad(piece.b, ",
        (PROFILES + "for_servers_ranks_are_padded_and_scales_are_in_b",),
    ),
    Mutation(
        "experts' B is written expert by expert",
        "jlora/interchange/leaves/layout.py",
        "return b.transpose(2, 1, 0).reshape(b.shape[2], -1)",
        "return b.transpose(2, 0, 1).reshape(b.shape[2], -1)",
        (COMES_BACK,),
    ),
    Mutation(
        "a convolution's window is turned round",
        "jlora/interchange/leaves/layout.py",
        "order = (*range(2, tensor.ndim), 1, 0)",
        "order = (*reversed(range(2, tensor.ndim)), 1, 0)",
        (COMPUTES,),
    ),
    Mutation(
        "a router is named as a module",
        "jlora/interchange/leaves/names.py",
        'return self.experts is not None or self.kind == "parameter"',
        "return self.experts is not None",
        (PROFILES + "a_linear_weight_of_another_module_than_a_linear_is_named_as_a_parameter",),
    ),
    Mutation(
        "the last of two nested experts is inside",
        "jlora/interchange/kinds/lora.py",
        "for place in places), reverse=True)",
        "for place in places))",
        (COMES_BACK,),
    ),
    Mutation(
        "targets are named by their last word whatever else has it",
        "jlora/interchange/kinds/lora.py",
        "found.append(last if whole else name)",
        "found.append(last)",
        (PROFILES + "targets_are_named_by_their_last_word_only_where_all_of_that_word_are_meant",),
    ),
    Mutation(
        "the parts that were not trained are missing from a saved parameter",
        "jlora/interchange/trained/wholes.py",
        'return {} if slot.keys in self.trained else {"copy_of_base": True}',
        "return {}",
        (NAMES + "a_trained_leaf_is_split_and_joined_too",),
    ),
)

STATED_KINDS = (
    Mutation(
        "a missing tensor of a stated kind is passed over",
        "jlora/interchange/kinds/read_table.py",
        "for missing in sorted(names - set(found.keys)):",
        "for missing in ():",
        (STATED + "any_missing_tensor_is_named",),
    ),
    Mutation(
        "a superfluous tensor of a stated kind is passed over",
        "jlora/interchange/kinds/read_table.py",
        "for other in sorted(set(found.keys) - names):",
        "for other in ():",
        (MADE_UP + "a_field_that_only_some_matrices_have_is_written_and_wanted_for_these",),
    ),
    Mutation(
        "constants that are in no tensor are not compared",
        "jlora/interchange/leaves/forms.py",
        "    if not constants:\n        return True\n",
        "    return True\n",
        (MADE_UP + "a_constant_that_nobody_can_make_again_has_no_place",),
    ),
    Mutation(
        "one folder has two values of one setting",
        "jlora/interchange/kinds/table_settings.py",
        "if _MISSING in values or (len(values) > 1 and not setting.pattern):",
        "if _MISSING in values:",
        (MADE_UP + "settings_that_no_one_folder_holds_have_no_place",),
    ),
    Mutation(
        "settings of a stated kind that jlora has not are passed over",
        "jlora/interchange/kinds/table_settings.py",
        "        settings.wanted(name, value)\n",
        "        pass\n",
        (MADE_UP + "settings_that_it_has_not_are_refused_by_name",),
    ),
    Mutation(
        "copies of a tensor of the whole model may differ",
        "jlora/interchange/kinds/read_table.py",
        "folder.read(one.keys[tensor.name]).tobytes() != folder.read(key).tobytes()",
        "False",
        (MADE_UP + "tensors_of_the_whole_model_go_out_once_and_with_every_module_and_may_be_larger",),
    ),
)

MUTATIONS = (*IN, *OUT, *STATED_KINDS)
