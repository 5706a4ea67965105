"""Faults in what is made, kept and read again: adapters, starts, files, fingerprints, meshes, statistics, losses."""

from mutations.mutation import Mutation

AVERAGE = "tests/test_average.py::test_"
EVERY_LEAF = "tests/test_spec.py::test_every_leaf_gets_its_own_random_values_whatever_else_is_adapted"
FILES = "tests/test_files.py::test_"
FINGERPRINT = "tests/test_fingerprint.py::test_"
INTRINSIC = "tests/test_intrinsic.py::test_"
LOSSES = "tests/test_ba_lora.py::test_"
LCM = "tests/test_latent_consistency.py::test_"
ZERO = "tests/test_zero.py::test_"
MESH = "tests/test_mesh.py::test_"
OFFLOAD = "tests/test_offload.py::test_"
OBSERVE = "tests/test_observe.py::test_"
PREPARE = "tests/test_prepare.py::test_"
REGISTERED = "tests/test_registered.py::test_"
SERIALIZE = "tests/test_serialize.py::test_"
SWITCH = "tests/test_switch.py::test_"

ADAPTED = (
    Mutation(
        "all leaves start alike",
        "jlora/core/tree/starts.py",
        "    key = jax.random.fold_in(key, paths.number(site.path))\n",
        "",
        (EVERY_LEAF,),
    ),
    Mutation(
        "all matrices of a stack start alike",
        "jlora/core/tree/starts.py",
        "keys = jax.random.split(key, site.batch_shape) if site.batch_axes else key",
        "keys = jax.numpy.broadcast_to(key, site.batch_shape) if site.batch_axes else key",
        ("tests/contract/test_contract.py::test_contract[LoRA(rank=4)-check_keys]",),
    ),
    Mutation(
        "a merge leaves the adapter that is under another one",
        "jlora/core/tree/merge.py",
        "lambda node: merge(node) if isinstance(node, Adapted) else decoded(node)",
        "lambda node: node.base if isinstance(node, Adapted) else decoded(node)",
        ("tests/test_trees.py::test_a_second_adapter_goes_on_an_adapted_and_lift_and_merge_see_through",),
    ),
    Mutation(
        "a merged leaf lies where the compiler puts it",
        "jlora/core/tree/merge.py",
        "return jax.device_put(array, sharding)",
        "return array",
        (
            MESH + "merge_save_and_load_keep_the_shardings",
            "tests/contract/test_contract.py::test_contract[Full()-check_merge]",
        ),
    ),
    Mutation(
        "classes of one name share their constants",
        "jlora/core/tree/adapted.py",
        'type(method).__name__ + (f"_{same}" if same else "")',
        "type(method).__name__",
        (SERIALIZE + "classes_of_the_same_name_share_no_constants",),
    ),
    Mutation(
        "two leaves may have one path",
        "jlora/core/tree/adapterize.py",
        'if (path := "/".join(keys)) in seen:',
        'if (path := "/".join(keys)) in ():',
        ("tests/test_spec.py::test_two_leaves_with_the_same_path_are_refused",),
    ),
    Mutation(
        "a start that needs data goes without",
        "jlora/core/tree/starts.py",
        "if missing := sorted(site.method.needs - set(statistics)):",
        "if missing := sorted(site.method.needs & set()):",
        (PREPARE + "a_method_that_needs_data_says_so_when_it_gets_none",),
    ),
    Mutation(
        "gradients of several batches are added up and not averaged",
        "jlora/core/transforms/prepare.py",
        "return total / count.reshape(*count.shape, *[1] * (total.ndim - count.ndim))",
        "return total",
        (PREPARE + "starts_are_made_of_the_mean_gradients",),
    ),
    Mutation(
        "inputs that the mask leaves out are in the mean",
        "jlora/core/protocol/statistics.py",
        "return jnp.sum(x * counts[..., None], axis=",
        "return jnp.sum(x, axis=",
        (PREPARE + "means_of_inputs_are_over_all_tokens_that_the_mask_lets_count_in_every_form_of_use",),
    ),
    Mutation(
        "a row's covariance is not divided by the row's largest magnitude",
        "jlora/core/protocol/statistics.py",
        "_products(rows / jnp.where(most > 0, most, 1))",
        "_products(rows)",
        (PREPARE + "methods_that_need_gradients_inputs_or_nothing_share_a_spec_and_one_reading_of_the_batches",),
    ),
    Mutation(
        "batches are read once whatever the groups need",
        "jlora/core/transforms/prepare.py",
        "data = batches if len(groups) == 1 else list(batches)",
        "data = batches",
        (PREPARE + "means_of_inputs_are_over_all_tokens_that_the_mask_lets_count_in_every_form_of_use",),
    ),
    Mutation(
        "a fused pack takes the last of entries that two adapters share",
        "jlora/compose/switch.py",
        "    if len(updates) > 1:\n",
        "    if False:\n",
        (SWITCH + "fused_adapters_are_the_weighted_sum_of_their_updates",),
    ),
    Mutation(
        "the strength of a pack is lost",
        "jlora/compose/switch.py",
        "[update.values * s for update, s in",
        "[update.values for update, s in",
        (SWITCH + "fused_adapters_are_the_weighted_sum_of_their_updates",),
    ),
    Mutation(
        "a switch forgets to take the last pack away",
        "jlora/compose/switch.py",
        "        changed |= _write({site.path: changed[site.path] for site in saved.sites}, saved)\n",
        "        pass\n",
        (SWITCH + "one_pack_replaces_another_that_shares_entries_with_it",),
    ),
    Mutation(
        "squares of inputs of 16 bits are summed in 16 bits",
        "jlora/core/transforms/observe.py",
        "    x = x.astype(accumulation_dtype(x.dtype))\n",
        "",
        (OBSERVE + "squares_of_16_bits_are_summed_in_32",),
    ),
    Mutation(
        "a matrix that is used twice has the statistic of one use",
        "jlora/core/transforms/observe.py",
        "sums = functools.reduce(functools.partial(jax.tree.map, jnp.add), map(total, taps))",
        "sums = total(taps[0])",
        (OBSERVE + "a_matrix_that_is_used_at_two_places_has_the_sum_over_both",),
    ),
    Mutation(
        "a gradient flows through what was seen",
        "jlora/core/transforms/observe.py",
        "measure(jax.lax.stop_gradient(x), *given)",
        "measure(x, *given)",
        (OBSERVE + "outputs_and_gradients_are_those_of_lift_even_where_the_loss_uses_what_was_seen",),
    ),
    Mutation(
        "padding counts in BA-LoRA's terms",
        "jlora/losses/outputs.py",
        "return jnp.where(weights[..., None] != 0, z, 0), weights.astype(z.dtype)",
        "return z, jnp.ones(weights.shape, z.dtype)",
        (LOSSES + "values_and_gradients_are_those_of_numpy_and_padding_does_not_count",),
    ),
    Mutation(
        "the teacher of BA-LoRA gets a gradient",
        "jlora/losses/outputs.py",
        "t, _ = _outputs(jax.lax.stop_gradient(teacher), mask, form)",
        "t, _ = _outputs(teacher, mask, form)",
        (LOSSES + "a_model_at_its_start_is_consistent_and_the_teacher_gets_no_gradient",),
    ),
    Mutation(
        "guidance is a scale of 1 too little",
        "jlora/losses/latent_consistency.py",
        "output = output + w * (output",
        "output = output + (w - 1) * (output",
        (LCM + "whole_steps_and_samples_are_those_of_diffusers_and_peft[epsilon]",),
    ),
    Mutation(
        "the target of consistency distillation gets a gradient",
        "jlora/losses/latent_consistency.py",
        "z, late), jax.lax.stop_gradient(wanted)",
        "z, late), wanted",
        (LCM + "at_the_start_both_ends_are_the_bases_and_only_the_student_has_a_gradient",),
    ),
    Mutation(
        "the first step of the solver goes beyond its start",
        "jlora/losses/latent_consistency.py",
        "jnp.maximum(late - schedule.stride, 0)",
        "late - schedule.stride",
        (LCM + "whole_steps_and_samples_are_those_of_diffusers_and_peft[epsilon]",),
    ),
    Mutation(
        "noise is added for the timestep before",
        "jlora/losses/latent_consistency.py",
        "z.dtype), after).astype(z.dtype), x",
        "z.dtype), t).astype(z.dtype), x",
        (LCM + "whole_steps_and_samples_are_those_of_diffusers_and_peft[sample]",),
    ),
)

ANALYSIS = (
    Mutation(
        "a point that comes twice counts twice",
        "jlora/analysis/intrinsic.py",
        "    points = np.unique(points, axis=0)\n",
        "",
        (INTRINSIC + "twonn_is_that_of_a_plain_loop_and_blind_to_scale_turns_and_repetition",),
    ),
    Mutation(
        "the largest ratios count in TwoNN",
        "jlora/analysis/intrinsic.py",
        "kept = min(max(1, int((1 - trim) * len(ratios))), len(ratios) - 1)",
        "kept = len(ratios) - 1",
        (INTRINSIC + "twonn_is_that_of_a_plain_loop_and_blind_to_scale_turns_and_repetition",),
    ),
    Mutation(
        "layers are ordered by the text of their numbers",
        "jlora/core/protocol/layers.py",
        '    number = int(re.findall(r"\\d+$", layer[-1])[0])\n',
        '    number = re.findall(r"\\d+$", layer[-1])[0]\n',
        ("tests/allocate/test_prilora.py::test_layers_are_counted_by_stacked_axes_and_by_numbers_of_paths",),
    ),
    Mutation(
        "a lookup costs as much as a product",
        "jlora/core/products/low_rank.py",
        "(columns if lookup else rows + columns) + scale",
        "(rows + columns) + scale",
        ("tests/test_explain.py::test_products_are_counted_of_what_the_method_gives_as_data",),
    ),
)

STORED = (
    Mutation(
        "another base passes",
        "jlora/disk/adapters.py",
        'if (found := fingerprint(blank.base)) != described["base"]:',
        "if False:",
        (FILES + "a_base_that_differs_in_one_bit_is_another_base",),
    ),
    Mutation(
        "arrays are not compared by their own fingerprint",
        "jlora/disk/adapters.py",
        'if fingerprint(arrays) != described["adapters"]:',
        "if False:",
        (FILES + "a_folder_without_checksums_is_read_and_its_arrays_are_compared_by_their_own_fingerprint",),
    ),
    Mutation(
        "a changed hyperparameter passes",
        "jlora/disk/adapters.py",
        "    _check_digest(directory, described)\n",
        "",
        (FILES + "a_changed_hyperparameter_is_noticed",),
    ),
    Mutation(
        "damaged files of arrays are read",
        "jlora/disk/adapters.py",
        '    _check_files(directory, described.get("files", {}))\n',
        "",
        (FILES + "damage_to_any_file_is_one_error_and_nothing_else_is_printed",),
    ),
    Mutation(
        "what a failed save wrote stays",
        "jlora/disk/adapters.py",
        "        _remove(staging)\n",
        "",
        (FILES + "a_full_disk_leaves_nothing_behind",),
    ),
    Mutation(
        "a leaf may be described twice",
        "jlora/disk/adapters.py",
        "if len({site.keys for site in sites}) < len(sites):",
        "if False:",
        (FILES + "a_leaf_that_is_described_twice_is_noticed",),
    ),
    Mutation(
        "a fingerprint ignores where a value stands",
        "jlora/disk/fingerprint.py",
        "_mix(_mix(bits ^ seed) + _mix(position + seed))",
        "_mix(_mix(bits ^ seed))",
        (FINGERPRINT + "swapped_elements_rows_and_axes_change_it",),
    ),
    Mutation(
        "a fingerprint multiplies bits with positions",
        "jlora/disk/fingerprint.py",
        "_mix(_mix(bits ^ seed) + _mix(position + seed))",
        "(bits ^ seed) * (2 * position + 1)",
        (FINGERPRINT + "any_two_signs_that_change_together_change_it",),
    ),
    Mutation(
        "every block of a large leaf begins at position 0",
        "jlora/disk/fingerprint.py",
        "yield leaf[start : start + rows], np.uint32(start * math.prod(leaf.shape[1:]) % 2**32)",
        "yield leaf[start : start + rows], np.uint32(0)",
        (FINGERPRINT + "blocks_of_a_large_leaf_change_nothing",),
    ),
    Mutation(
        "a fingerprint ignores the dtype",
        "jlora/disk/fingerprint.py",
        "tuple(array.shape), str(dtype), sums",
        "tuple(array.shape), sums",
        (FINGERPRINT + "paths_shapes_and_dtypes_belong_to_it_and_the_order_of_keys_does_not",),
    ),
    Mutation(
        "a class of one's own takes over jlora's name",
        "jlora/disk/serialize.py",
        "return catalog.methods().get(cls.__name__) is cls",
        "return cls.__name__ in catalog.methods()",
        (SERIALIZE + "a_class_of_the_same_name_takes_over_no_table",),
    ),
    Mutation(
        "an unknown hyperparameter is passed over",
        "jlora/disk/serialize.py",
        "if unknown := sorted(set(given) - fields):",
        "given = {key: value for key, value in given.items() if key in fields}\n    if unknown := ():",
        (SERIALIZE + "a_wrong_table_is_refused_with_what_would_do",),
    ),
    Mutation(
        "fields are cut by the inner one of two folded axes",
        "jlora/core/protocol/roles.py",
        "return entries[wide[0]] if wide else None",
        "return entries[wide[-1]] if wide else None",
        (MESH + "adapters_lie_as_their_base_does_before_and_after_training",),
    ),
    Mutation(
        "a cut that does not divide is made",
        "jlora/core/tree/placement.py",
        "if shape[axis] % math.prod(sizes[name] for name in names):",
        "if False:",
        (MESH + "a_cut_that_does_not_divide_names_the_leaf_and_the_numbers",),
    ),
    Mutation(
        "axes along which weights are gathered count as cuts",
        "jlora/mesh.py",
        "if names and set(names) <= set(axes):",
        "if names:",
        (MESH + "only_the_axes_that_cut_activations_count_as_cuts",),
    ),
    Mutation(
        "adapters lie by longer specs than what a step returns",
        "jlora/core/tree/placement.py",
        "while entries and entries[-1] in (None, ()):",
        "while False:",
        (ZERO + "the_loops_step_is_compiled_once_and_moments_lie_beside_what_is_trained",),
    ),
    Mutation(
        "the step counts of an optimizer start on one device",
        "jlora/optimize/placed.py",
        "return _put(state, moments) if _lie_there(params, trained) else state",
        "return state",
        (ZERO + "the_loops_step_is_compiled_once_and_moments_lie_beside_what_is_trained",),
    ),
    Mutation(
        "moments are cut beside an axis that cuts them already",
        "jlora/mesh.py",
        "if part % sizes[axis] == 0]",
        "if True]",
        (ZERO + "what_the_axis_does_not_divide_stays_whole",),
    ),
    Mutation(
        "an optimizer brings arrays of another mesh to its own",
        "jlora/optimize/placed.py",
        "return any(each.shape == known.shape and each.axis_types == known.axis_types for each in found if not each.empty)",
        "return True",
        (ZERO + "an_optimizer_made_on_a_mesh_leaves_other_meshes_alone",),
    ),
    Mutation(
        "starts lie on one device",
        "jlora/core/tree/placement.py",
        "    if shardings is None:\n        return start\n",
        "    if True:\n        return start\n",
        ("tests/contract/test_contract.py::test_contract[LoRA(rank=4)-check_mesh]",),
    ),
)

HELD = (
    Mutation(
        "all groups are fetched as early as can be",
        "jlora/optimize/offload.py",
        "        if last:\n",
        "        if False:\n",
        (OFFLOAD + "a_group_is_sent_back_before_the_next_is_fetched",),
    ),
    Mutation(
        "a group has no size",
        "jlora/optimize/offload.py",
        "if groups and size + own <= group_bytes:",
        "if groups:",
        (OFFLOAD + "a_group_is_sent_back_before_the_next_is_fetched",),
    ),
    Mutation(
        "moments of different arrays are in one order of their own",
        "jlora/optimize/offload.py",
        "next((order[end] for end in ends if end in order), -1)",
        "number",
        (OFFLOAD + "a_group_is_sent_back_before_the_next_is_fetched",),
    ),
    Mutation(
        "the new state stays on the device",
        "jlora/optimize/offload.py",
        "self.sent[n] = jax.device_put(self._value(atom), jax.memory.Space.Host)",
        "self.sent[n] = self._value(atom)",
        (OFFLOAD + "a_group_is_sent_back_before_the_next_is_fetched",),
    ),
    Mutation(
        "what stays as it is goes to the device and back",
        "jlora/optimize/offload.py",
        "            if on_host(old):\n",
        "            if False:\n",
        (OFFLOAD + "what_an_optimizer_leaves_as_it_is_is_not_fetched",),
    ),
    Mutation(
        "a rule's masks lie on one device of a mesh",
        "jlora/optimize/offload.py",
        "own = leaf.sharding if leaf.committed or place is None else place",
        "own = leaf.sharding",
        (OFFLOAD + "on_a_mesh_and_in_a_scan_the_state_lies_beside_the_trained_arrays",),
    ),
    Mutation(
        "a step count lies on no device in particular",
        "jlora/optimize/offload.py",
        "return leaf if place is None else jax.device_put(leaf, own)",
        "return leaf",
        (OFFLOAD + "steps_are_those_of_the_optimizer_and_the_state_stays_on_the_host",),
    ),
    Mutation(
        "a state on the device is taken",
        "jlora/optimize/offload.py",
        "        _check_state(state)\n",
        "",
        (OFFLOAD + "what_cannot_work_is_refused",),
    ),
    Mutation(
        "a rule goes around a state on the host",
        "jlora/optimize/allocate/inside.py",
        "    if any(map(on_host, jax.tree.leaves(state))):\n",
        "    if False:\n",
        (OFFLOAD + "what_cannot_work_is_refused",),
    ),
    Mutation(
        "moments on the host are pruned there",
        "jlora/optimize/moments.py",
        "given, opt_state = opt_state, offload.fetched(opt_state)",
        "given = opt_state",
        (OFFLOAD + "a_restart_prunes_a_state_on_the_host_and_leaves_it_there",),
    ),
    Mutation(
        "a round records on the host",
        "jlora/methods/alora/rule.py",
        "_recorded(offload.fetched(opt_state), adapted,",
        "_recorded(opt_state, adapted,",
        (OFFLOAD + "a_round_of_alora_moves_ranks_and_moments_of_a_state_on_the_host",),
    ),
)

AVERAGED = (
    Mutation(
        "weights of a mean are not divided by their sum",
        "jlora/compose/average.py",
        "float(weight) / sum(given) for",
        "float(weight) for",
        (AVERAGE + "the_mean_is_that_of_the_updates_whatever_the_ranks_scales_and_methods",),
    ),
    Mutation(
        "the mean takes its scale twice",
        "jlora/compose/average.py",
        '"b": fields["b"] / like.scale}',
        '"b": fields["b"]}',
        (AVERAGE + "the_mean_is_that_of_the_updates_whatever_the_ranks_scales_and_methods",),
    ),
)

SERIALIZED = (
    Mutation(
        "Flax writes the base with its adapters",
        "jlora/disk/registered.py",
        '"frozen": adapted.frozen}',
        '"frozen": adapted.frozen, "all": adapted.base}',
        (REGISTERED + "flax_writes_the_adapters_and_not_the_base",),
    ),
    Mutation(
        "Flax restores adapters on another base",
        "jlora/disk/registered.py",
        'written = state.get("base") if _has_values(adapted.base) else None',
        "written = None",
        (REGISTERED + "adapters_of_another_base_shape_or_kind_are_refused",),
    ),
    Mutation(
        "Flax restores arrays of any shape",
        "jlora/disk/registered.py",
        "if _compat.is_array(old) and (np.shape(leaf), leaf.dtype) != (old.shape, old.dtype):",
        "if False:",
        (REGISTERED + "adapters_of_another_base_shape_or_kind_are_refused",),
    ),
    Mutation(
        "an exported plan forgets what is beside a leaf",
        "jlora/disk/registered.py",
        ', beside=tuple(each["beside"]))',
        ")",
        (REGISTERED + "plans_of_all_methods_and_forms_of_all_codes_come_back_from_bytes",),
    ),
    Mutation(
        "an Adapted is any container",
        "jlora/core/tree/adapted.py",
        "    __contains__ = __getitem__ = _refuse\n",
        "",
        (REGISTERED + "an_adapted_is_no_tree_of_params_and_says_what_is",),
    ),
)

MUTATIONS = (*ADAPTED, *ANALYSIS, *STORED, *HELD, *AVERAGED, *SERIALIZED)
