"""Faults in the job: step, data, checkpoints, resuming, metrics."""

from mutations.mutation import Mutation

BEST = "tests/training/test_best.py::test_"
BATCHES = "tests/training/test_batches.py::test_"
CHECKPOINTS = "tests/training/test_checkpoints.py::test_"
EXAMPLES = "tests/training/test_examples.py::test_"
FORMATS = "tests/training/test_formats.py::test_"
JOB = "tests/training/test_job.py::test_"
PAIRS = "tests/training/test_preferences.py::test_"
OPTIMIZERS = "tests/training/test_optimizers.py::test_"
PROGRESS = "tests/training/test_progress.py::test_"
PEERS = "tests/training/test_peers.py::test_"
QUANTIZED = "tests/training/test_quantized_base.py::test_"
SETTINGS = "tests/training/test_settings.py::test_"
STREAMED = "tests/training/test_streaming.py::test_"
STEPS = "tests/training/test_steps.py::test_"
VERDICT = "tests/training/test_verdict.py::test_"
MESHES = "tests/training/test_mesh.py::test_"
PLANS = "tests/training/test_plan.py::test_"
OWN_KEY = STEPS + "every_step_and_every_part_of_it_drops_by_a_key_of_its_own"

STEP = (
    Mutation(
        "every step drops by the run's key",
        "jlora/training/model/loop.py",
        "key, asked = jax.random.fold_in(state.key, state.step), asked_by(adapted)",
        "key, asked = state.key, asked_by(adapted)",
        (OWN_KEY + "[1]",),
    ),
    Mutation(
        "every part of a step drops by one key",
        "jlora/training/model/loop.py",
        "value_and_grad(params, part[0], jax.random.fold_in(key, part[1]))",
        "value_and_grad(params, part[0], key)",
        (OWN_KEY + "[2]",),
    ),
    Mutation(
        "the loss is a mean of the parts' means",
        "jlora/training/model/loop.py",
        "return found.loss / weight, (seen, found.more)",
        "return found.loss / found.weight / batch['weights'].shape[0], (seen, found.more)",
        (STEPS + "accumulated_parts_give_the_step_of_the_whole_batch",),
    ),
    Mutation(
        "the step is not counted",
        "jlora/training/model/loop.py",
        "return State(params, opt_state, state.step + 1, state.key), result",
        "return State(params, opt_state, state.step, state.key), result",
        (OWN_KEY + "[1]",),
    ),
    Mutation(
        "what is padding has a loss",
        "jlora/training/model/losses.py",
        "return Sums(jnp.sum(losses * weights),",
        "return Sums(jnp.sum(losses),",
        (STEPS + "the_loss_is_the_mean_over_predictions",),
    ),
    Mutation(
        "the accuracy counts rows without weight",
        "jlora/training/model/losses.py",
        "jnp.sum(right * weights), confusion=confusion)",
        "jnp.sum(right), confusion=confusion)",
        (STEPS + "the_accuracy_is_that_of_the_rows_that_count",),
    ),
    Mutation(
        "the perplexity is that of bits",
        "jlora/training/model/scores.py",
        '"perplexity": math.exp(min(loss, 700.0))',
        '"perplexity": 2 ** (min(loss, 700.0))',
        (STEPS + "the_loss_is_the_mean_over_predictions",),
    ),
    Mutation(
        "the first step of a warm-up has the rate 0",
        "jlora/training/run/schedule.py",
        "optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))",
        "optax.linear_schedule(0.0, peak, warmup)",
        (STEPS + "schedules_rise_and_fall_as_their_names_say",),
    ),
    Mutation(
        "the gradient is not clipped",
        "jlora/training/run/schedule.py",
        "tx = tx if isinstance(clip, int | float) and clip == 0 else optax.chain(optax.clip_by_global_norm(clip), tx)",
        "pass",
        (STEPS + "the_gradient_is_clipped_by_its_norm_and_its_decay_is_the_settings",),
    ),
    Mutation(
        "the weight decay of the settings is lost",
        "jlora/training/run/schedule.py",
        'weight_decay=value["weight_decay"],',
        "weight_decay=0.0,",
        (STEPS + "the_gradient_is_clipped_by_its_norm_and_its_decay_is_the_settings",),
    ),
    Mutation(
        "a step is logged with the rate of the next one",
        "jlora/training/run/trainer.py",
        "self._rate(step - 1)",
        "self._rate(step)",
        (JOB + "a_step_is_logged_with_the_rate_that_it_was_taken_with",),
    ),
    Mutation(
        "weights that are not finite are saved",
        "jlora/training/run/trainer.py",
        "if not self._is_finite(state.params):",
        "if False:",
        (JOB + "weights_that_are_not_finite_are_not_saved",),
    ),
)

DATA = (
    Mutation(
        "a batch of one row can't be counted",
        "jlora/training/data/pipeline.py",
        "order.batch(batch, drop_remainder=True, batch_fn=assemble)",
        "order.batch(batch, batch_fn=assemble)",
        (BATCHES + "a_batch_may_be_of_one_row",),
    ),
    Mutation(
        "packed rows overflow",
        "jlora/training/data/packing.py",
        "fitting = rooms >> length\n",
        "fitting = rooms >> (length - 1)\n        length -= 1\n",
        (BATCHES + "packing_keeps_every_example_once_within_the_capacity",),
    ),
    Mutation(
        "packed examples are of one segment",
        "jlora/training/data/packing.py",
        "np.full(len(example), number, np.int32)",
        "np.full(len(example), 1, np.int32)",
        (BATCHES + "packed_rows_have_segments_and_positions_that_restart",),
    ),
    Mutation(
        "positions go on over packed examples",
        "jlora/training/data/pipeline.py",
        "return index - np.maximum.accumulate(starts)",
        "return index",
        (BATCHES + "packed_rows_have_segments_and_positions_that_restart",),
    ),
    Mutation(
        "all epochs have one order",
        "jlora/training/data/pipeline.py",
        ".repeat(None, reseed_each_epoch=True)",
        ".repeat(None, reseed_each_epoch=False)",
        (BATCHES + "an_epoch_shows_every_example_once_in_an_order_of_its_own",),
    ),
    Mutation(
        "rows that fill up a batch count",
        "jlora/training/data/pipeline.py",
        "return collate(chosen, length, batch)",
        "return collate([*chosen, *chosen[:1] * (batch - len(chosen))], length, batch)",
        (BATCHES + "validation_shows_everything_once_and_fills_up_with_rows_that_weigh_nothing",),
    ),
    Mutation(
        "rows of a streamed mixture are those of its first file",
        "jlora/training/data/formats/mixture.py",
        "np.concatenate([start + own for",
        "np.concatenate([own for",
        (STREAMED + "streamed_data_are_those_in_memory_to_the_last_bit[a mixture, some rows of it]",),
    ),
    Mutation(
        "streamed examples forget that they were cut",
        "jlora/training/data/streaming/spool.py",
        "self._flags.append(example.cut)",
        "self._flags.append(False)",
        (STREAMED + "streamed_data_are_those_in_memory_to_the_last_bit[labels]",),
    ),
    Mutation(
        "streamed packed rows are as long as their last text",
        "jlora/training/data/streaming/lazy.py",
        "np.diff(np.cumsum(examples.lengths[self._numbers])[self._ends - 1], prepend=0)",
        "examples.lengths[self._numbers][self._ends - 1]",
        (STREAMED + "streamed_data_are_those_in_memory_to_the_last_bit[texts packed]",),
    ),
    Mutation(
        "one text is streamed",
        "jlora/training/data/streaming/opening.py",
        "    if texts:\n",
        "    if False:\n",
        (STREAMED + "a_text_is_not_streamed_and_says_so",),
    ),
    Mutation(
        "the digest of the data leaves labels out",
        "jlora/training/data/dataset.py",
        "        sha.update(np.int64(example.label).tobytes())\n",
        "",
        (BATCHES + "one_changed_label_is_other_data",),
    ),
    Mutation(
        "the loss is on the prompt too",
        "jlora/training/data/encode.py",
        '[(row.text("prompt"), False), (row.text("completion"), True)]',
        '[(row.text("prompt"), True), (row.text("completion"), True)]',
        (EXAMPLES + "the_loss_is_on_the_completion_and_its_end_alone",),
    ),
    Mutation(
        "targets are the tokens themselves",
        "jlora/training/data/encode.py",
        "return Example(tokens[:-1], tokens[1:], wanted[1:]",
        "return Example(tokens[:-1], tokens[:-1], wanted[1:]",
        (EXAMPLES + "every_token_of_a_text_is_predicted_once",),
    ),
    Mutation(
        "pieces of a long text do not overlap",
        "jlora/training/data/encode.py",
        "tokens[i : i + max_length + 1], wanted[i : i + max_length + 1]",
        "tokens[i : i + max_length], wanted[i : i + max_length]",
        (EXAMPLES + "every_token_of_a_text_is_predicted_once",),
    ),
    Mutation(
        "labels that are numbers are ordered by alphabet",
        "jlora/training/data/encode.py",
        "key=(lambda name: (int(name), name)) if numbers else None",
        "key=None",
        (EXAMPLES + "labels_are_ordered_and_checked",),
    ),
    Mutation(
        "a part of the training data is validated on",
        "jlora/training/data/dataset.py",
        "train, held_out = np.sort(order[:-count]), np.sort(order[-count:])",
        "train, held_out = np.sort(order), np.sort(order[-count:])",
        (BATCHES + "what_is_held_out_is_not_trained_on",),
    ),
    Mutation(
        "a batch that accumulation does not divide passes",
        "jlora/training/settings/fields.py",
        "if settings.batch is not None and settings.batch % settings.accumulate:",
        "if False:",
        (SETTINGS + "a_wrong_file_is_an_error_that_names_key_and_file",),
    ),
)

RUN = (
    Mutation(
        "moments stay on the device whatever is asked for",
        "jlora/training/run/schedule.py",
        "return jlora.offload(tx) if settings.offload else tx",
        "return tx",
        (JOB + "a_run_goes_on_with_its_moments_on_the_host_and_ends_with_the_same_bits",),
    ),
    Mutation(
        "one checkpoint too many is kept",
        "jlora/training/run/checkpoint.py",
        "for step in steps[self.keep :] if step != best]",
        "for step in steps[self.keep + 1 :] if step != best]",
        (CHECKPOINTS + "as_many_checkpoints_are_kept_as_asked_for_and_the_latest",),
    ),
    Mutation(
        "the oldest checkpoints are kept",
        "jlora/training/run/checkpoint.py",
        'if re.fullmatch("0|[1-9][0-9]{0,17}", name)), reverse=True)',
        'if re.fullmatch("0|[1-9][0-9]{0,17}", name)))',
        (CHECKPOINTS + "as_many_checkpoints_are_kept_as_asked_for_and_the_latest",),
    ),
    Mutation(
        "a damaged checkpoint is whole",
        "jlora/training/run/checkpoint.py",
        'return None if wrong is None else f"is damaged: {wrong}"',
        "return None",
        (CHECKPOINTS + "a_manifest_in_any_state_leads_back_to_the_checkpoint_before",),
    ),
    Mutation(
        "a checkpoint of another base is restored",
        "jlora/training/run/checkpoint.py",
        'if run["base"] != self.fingerprint:',
        "if False:",
        (CHECKPOINTS + "a_state_comes_back_with_its_key_its_constants_and_its_step",),
    ),
    Mutation(
        "a resumed run begins the random keys anew",
        "jlora/training/run/checkpoint.py",
        'key = jax.random.wrap_key_data(arrays["run"]["key"])',
        "key = jax.random.key(0)",
        (CHECKPOINTS + "a_state_comes_back_with_its_key_its_constants_and_its_step",),
    ),
    Mutation(
        "a resumed run has the constants of the start",
        "jlora/training/run/checkpoint.py",
        'adapted.replace(params=params, frozen=fill("frozen", adapted.frozen))',
        "adapted.replace(params=params)",
        (CHECKPOINTS + "a_state_comes_back_with_its_key_its_constants_and_its_step",),
    ),
    Mutation(
        "a run is resumed with other settings",
        "jlora/training/run/record.py",
        'if new != old and not field.metadata["resumable"]:',
        "if False:",
        (JOB + "resuming_with_other_settings_names_the_setting",),
    ),
    Mutation(
        "a run is resumed with other data",
        "jlora/training/run/record.py",
        'if stored.get("data_sha256") != about["data_sha256"]:',
        "if False:",
        (JOB + "resuming_with_other_data_is_an_error",),
    ),
    Mutation(
        "lines of later steps stay in the metrics",
        "jlora/training/reporting/metrics.py",
        'for record in read_metrics(self.path) if record["step"] <= resume_at]',
        "for record in read_metrics(self.path)]",
        (JOB + "a_half_written_line_of_metrics_is_dropped",),
    ),
    Mutation(
        "gradients of 0 at no loss end a run",
        "jlora/training/reporting/verdict.py",
        'r["gradient_norm"] == 0 and r["loss"] > _ALL_RIGHT for r in last',
        'r["gradient_norm"] == 0 for r in last',
        (VERDICT + "only_gradients_of_exactly_0_at_a_loss_are_stuck",),
    ),
    Mutation(
        "a run that made the model worse is a good one",
        "jlora/training/reporting/verdict.py",
        "    if not _is_worse(before, after):\n        return None\n",
        "    return None\n",
        (VERDICT + "a_validation_that_got_worse_is_told_with_its_reason",),
    ),
    Mutation(
        "a folder in use is taken",
        "jlora/training/folder.py",
        "    if holder is not None:\n        raise",
        "    if False:\n        raise",
        (JOB + "a_folder_in_use_names_the_process",),
    ),
    Mutation(
        "a quantized base is decoded to write text",
        "jlora/training/model/samples.py",
        "if not coded and all(",
        "if all(",
        (QUANTIZED + "the_subject_of_a_job_is_encoded_and_says_what_is_not",),
    ),
    Mutation(
        "a weight that no block divides is left out in silence",
        "jlora/training/model/subject.py",
        "return spec, tuple(told)",
        "return spec, ()",
        (QUANTIZED + "the_subject_of_a_job_is_encoded_and_says_what_is_not",),
    ),
    Mutation(
        "a run is opened on the plain base",
        "jlora/training/model/subject.py",
        "model, params = _load(settings, spec)",
        "model, params = _load(settings, None)",
        (QUANTIZED + "the_subject_of_a_job_is_encoded_and_says_what_is_not",),
    ),
    Mutation(
        "a start from what a base lost takes it from the quantized base",
        "jlora/training/model/prepared.py",
        "plain = load_params(settings)",
        "plain = jlora.dequantize(subject.params)",
        (QUANTIZED + "a_start_from_a_residual_is_of_what_the_base_lost",),
    ),
    Mutation(
        "inspect takes a quantized model for a plain one",
        "jlora/training/model/subject.py",
        "    if is_quantized(config, directory):\n",
        "    if False:\n",
        (QUANTIZED + "a_model_of_bitsandbytes_is_a_base_as_it_is",),
    ),
    Mutation(
        "a function gets an Adapted without sites",
        "jlora/core/transforms/lift.py",
        "if not any(isinstance(leaf, Adapted | Stored) for _, leaf in found):",
        "if not any(leaf.plan.sites if isinstance(leaf, Adapted) else isinstance(leaf, Stored) for _, leaf in found):",
        ("tests/test_lift_forms.py::test_an_adapted_without_sites_runs_as_its_base",),
    ),
)

MESH = (
    Mutation(
        "a stack of vectors is cut as a matrix",
        "jlora/training/hosts/placement.py",
        "or not _MATRIX.fullmatch(path) or not names:",
        "or len(shape) < 2 or not names:",
        (MESHES + "two_axes_cut_the_last_two_axes_of_a_matrix_and_vectors_and_layers_are_whole",),
    ),
    Mutation(
        "slices are filled one after another along the first axis",
        "jlora/training/hosts/placement.py",
        'across = [len(slices) if name == "data" else 1 for name in axes]',
        "across = [len(slices) if name == next(iter(axes)) else 1 for name in axes]",
        (MESHES + "data_goes_across_slices_and_the_rest_within",),
    ),
    Mutation(
        "a rule that comes later wins",
        "jlora/core/tree/placement.py",
        "found = {**dict.fromkeys(matched, pattern), **found}",
        "found = {**found, **dict.fromkeys(matched, pattern)}",
        ("tests/test_mesh.py::test_rules_for_paths_say_where_a_base_lies_and_a_wrong_one_is_refused",),
    ),
    Mutation(
        "rules of the file come before those of flags",
        "jlora/training/settings/configuration.py",
        "value = {**value, **{name: given for name, given in values[key].items() if name not in value}}",
        "value = {**values[key], **value}",
        (SETTINGS + "flags_of_rules_come_before_those_of_the_file_and_an_axis_that_a_rule_names_cuts",),
    ),
    Mutation(
        "an axis that cuts nothing passes",
        "jlora/training/settings/axes.py",
        'if name == "data" or name in named or name in cutting:',
        "if True:",
        (SETTINGS + "impossible_combinations_name_the_flag",),
    ),
    Mutation(
        "a run goes on to another mesh with the rules of the old one",
        "jlora/training/commands/actions.py",
        'stored.pop("shard", None)',
        "pass",
        (SETTINGS + "a_run_goes_on_to_another_mesh_without_the_rules_of_the_old_one",),
    ),
    Mutation(
        "what leaves share is read onto one device",
        "jlora/core/tree/placement.py",
        "sharding = whole if at is None else at.get(keys[-1], other)",
        "sharding = other if at is None else at.get(keys[-1], other)",
        ("tests/test_shared.py::test_on_a_mesh_they_lie_whole_and_give_what_one_device_gives",),
    ),
    Mutation(
        "a trace on a mesh warns of nothing",
        "jlora/core/tree/adapterize.py",
        "if any(map(placement.is_cut_unseen, arrays)):",
        "if False:",
        (
            "tests/test_mesh.py::test_under_jit_the_shardings_of_shapes_say_where_adapters_lie_and_without_them_a_warning_does",
        ),
    ),
    Mutation(
        "adapters on a base of shapes are read",
        "jlora/disk/adapters.py",
        "    if _is_abstract(params):\n        return",
        "    if False:\n        return",
        ("tests/test_mesh.py::test_base_and_adapters_are_read_straight_to_their_places_on_a_mesh",),
    ),
    Mutation(
        "a plan counts arrays whole",
        "jlora/training/commands/plan.py",
        "math.prod(leaf.sharding.shard_shape(leaf.shape))",
        "math.prod(leaf.shape)",
        (PLANS + "without_a_compiler_a_config_is_enough_and_what_is_not_counted_is_said",),
    ),
    Mutation(
        "a plan that does not fit ends well",
        "jlora/training/commands/actions.py",
        'return f"does not fit into the memory of {arguments.device}" if large else None',
        "return None",
        (PLANS + "what_does_not_fit_ends_in_a_sentence_and_exit_code_3",),
    ),
    Mutation(
        "a plan takes moments to be whole on every chip",
        "jlora/training/commands/plan.py",
        "like.sharding if like is not None and like.shape == leaf.shape else whole",
        "whole",
        (PLANS + "without_a_compiler_a_config_is_enough_and_what_is_not_counted_is_said",),
    ),
)

HOSTS = (
    Mutation(
        "an error that comes from a lost process is told as the reason",
        "jlora/training/hosts/peers.py",
        "reason = self.lost or error",
        "reason = error",
        (PEERS + "an_error_in_the_exchange_between_devices_is_told_as_what_caused_it",),
    ),
    Mutation(
        "a process that is done counts as dead",
        "jlora/training/hosts/peers.py",
        "word == before and word.startswith(_BEAT) and",
        "word == before and",
        (PEERS + "a_process_that_is_done_is_not_dead",),
    ),
    Mutation(
        "what all meet ends those that save",
        "jlora/training/hosts/peers.py",
        "_DONE if reason is None or isinstance(reason, _IN_ALL) else",
        "_DONE if reason is None else",
        (PEERS + "what_all_meet_by_themselves_makes_none_give_up_the_others",),
    ),
    Mutation(
        "a process waits for ever for one that gave up",
        "jlora/training/hosts/peers.py",
        "        os._exit(lost.code)\n",
        "",
        (PEERS + "a_process_that_hangs_is_ended_after_another_gave_up",),
    ),
    Mutation(
        "only one process knows of a death",
        "jlora/training/hosts/peers.py",
        "                self._say(_DEAD, process)\n",
        "",
        (PEERS + "a_process_whose_signs_of_life_end_is_dead_and_the_others_end_with_a_sentence",),
    ),
    Mutation(
        "hosts may differ in what they stand on",
        "jlora/training/hosts/agreement.py",
        "if theirs.value != ours.value:",
        "if theirs.said != ours.said:",
        (PEERS + "the_first_difference_is_told_with_its_process",),
    ),
    Mutation(
        "the sign in a folder is its content",
        "jlora/training/folder.py",
        " and not name.startswith(_SIGN)",
        "",
        (PEERS + "the_sign_by_which_a_folder_is_known_leaves_no_trace_and_is_no_content",),
    ),
    Mutation(
        "where a process writes its dumps must be the same",
        "jlora/training/hosts/versions.py",
        " if not _FLAGS_OF_A_PROCESS.search(word)",
        "",
        (PEERS + "the_environment_is_what_decides_about_numbers_and_not_where_a_process_writes",),
    ),
    Mutation(
        "a signal's handler stays behind",
        "jlora/training/hosts/stopping.py",
        "    finally:\n        restore()",
        "    finally:\n        pass",
        (JOB + "a_run_leaves_the_handlers_of_signals_as_they_were",),
    ),
)

PREFERENCES = (
    Mutation(
        "the reference has the adapters",
        "jlora/training/model/preferences.py",
        "base = params.base if isinstance(params, jlora.Adapted) else params",
        "base = params",
        (PAIRS + "each_loss_is_its_formula_and_padding_weighs_nothing[dpo]",),
    ),
    Mutation(
        "a pair that is padding has a loss",
        "jlora/training/model/preferences.py",
        "return Sums(jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights), told)\n\n\ndef _judged",
        "return Sums(jnp.sum(losses), jnp.sum(weights), jnp.sum(right * weights), told)\n\n\ndef _judged",
        (PAIRS + "each_loss_is_its_formula_and_padding_weighs_nothing[dpo]",),
    ),
    Mutation(
        "KTO's divergence is of the answers themselves",
        "jlora/training/model/preferences.py",
        "divergence = jnp.sum(ratios[:, 1] * weights)",
        "divergence = jnp.sum(ratios[:, 0] * weights)",
        (PAIRS + "each_loss_is_its_formula_and_padding_weighs_nothing[kto]",),
    ),
    Mutation(
        "an answer by itself stands beside another one to its own prompt",
        "jlora/training/data/preferences/pairs.py",
        "            other[index] = other[index - 1]\n",
        "            pass\n",
        (PAIRS + "an_answer_by_itself_stands_beside_that_of_another_prompt",),
    ),
    Mutation(
        "shares of several files take all rows",
        "jlora/training/data/formats/mixture.py",
        "    if wanted is not None:\n",
        "    if wanted is None:\n",
        (FORMATS + "several_files_are_one_in_the_shares_that_are_asked_for",),
    ),
)


WATCHED = (
    Mutation(
        "slow steps are fetched at a time of each process's own",
        "jlora/training/run/trainer.py",
        " and not processes.several())",
        ")",
        (PROGRESS + "slow_steps_are_told_one_by_one_and_quick_ones_ten_together",),
    ),
    Mutation(
        "what a model writes moves the terminal's cursor",
        "jlora/training/reporting/shown.py",
        "line if line.isprintable() else repr(line)[1:-1]",
        "line",
        (PROGRESS + "a_sample_is_shown_line_by_line_and_does_nothing_to_the_terminal",),
    ),
    Mutation(
        "the checkpoint of the best validation goes with the others",
        "jlora/training/run/checkpoint.py",
        " if step != best]",
        "]",
        (BEST + "a_run_stops_early_and_ends_with_the_adapters_of_the_best_validation",),
    ),
    Mutation(
        "the best validation is the last of equal ones",
        "jlora/training/settings/scored.py",
        "else new < old",
        "else new <= old",
        (BEST + "the_best_validation_is_the_first_of_equal_ones_after_a_step",),
    ),
    Mutation(
        "a run ends with the last adapters",
        "jlora/training/run/trainer.py",
        "if best is None or best == int(state.step):",
        "if True:",
        (BEST + "a_run_stops_early_and_ends_with_the_adapters_of_the_best_validation",),
    ),
    Mutation(
        "a resumed run whose patience has ended trains on",
        "jlora/training/run/trainer.py",
        "        if self._is_enough():\n            return state\n",
        "",
        (BEST + "a_stopped_run_waits_on_as_long_and_ends_with_the_same_bits",),
    ),
    Mutation(
        "muon joins the matrices of a stack",
        "jlora/training/run/optimizers.py",
        "leaf.ndim - batch == 2",
        "leaf.ndim == 2",
        (OPTIMIZERS + "muon_makes_the_steps_of_each_matrix_of_a_stack_by_itself_and_adamw_those_of_vectors",),
    ),
)

ADAPTER = "tests/training/test_adapter.py::test_"
CONTINUED = (
    Mutation(
        "a run that goes on from adapters takes new ones",
        "jlora/training/run/continued.py",
        "return adapt(subject, settings, data, mesh, known) if settings.adapter is None else read_adapters(subject, settings)",
        "return adapt(subject, settings, data, mesh, known)",
        (ADAPTER + "a_run_goes_on_with_the_values_of_the_folder",),
    ),
    Mutation(
        "a resumed run does not look whether the adapters that it went on from are the same",
        "jlora/training/run/record.py",
        'if stored.get("continued") != about.get("continued"):',
        "if False:",
        (ADAPTER + "a_run_is_not_resumed_from_a_changed_folder",),
    ),
    Mutation(
        "what says how adapters are is passed over beside --adapter",
        "jlora/training/settings/fields.py",
        "        _check_adapter(settings)\n",
        "        pass\n",
        (ADAPTER + "what_says_how_adapters_are_is_refused_beside_them",),
    ),
    Mutation(
        "a method whose schedule has ended goes on",
        "jlora/training/run/continued.py",
        'if any("steps" in hyperparameters(type(part)) for part in parts(site.method)):',
        "if False:",
        (ADAPTER + "methods_that_follow_the_steps_of_their_run_are_refused",),
    ),
    Mutation(
        "on shapes PEFT's copies of the base are compared",
        "jlora/interchange/trained/read_wholes.py",
        "if index.valued and not np.array_equal(",
        "if not np.array_equal(",
        ("tests/interchange/test_hostile_files.py::test_a_copy_of_another_base_is_refused",),
    ),
)

MUTATIONS = (*STEP, *DATA, *RUN, *MESH, *HOSTS, *PREFERENCES, *WATCHED, *CONTINUED)
