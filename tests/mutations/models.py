"""Faults in the models of the package: attention, positions, loading, writing text."""

from mutations.mutation import Mutation

ATTENTION = "tests/models/test_model_attention.py::test_"
BITSANDBYTES = "tests/models/test_model_bitsandbytes.py::test_"
CLASSIFY = "tests/models/test_model_classify.py::test_"
ERRORS = "tests/models/test_model_load_errors.py::test_"
GENERATE = "tests/models/test_model_generate.py::test_"
GOLDEN = "tests/models/test_model_golden.py::test_"
HOSTILE = "tests/models/test_model_hostile_files.py::test_"
QUANTIZED = "tests/models/test_model_quantized.py::test_"
AGREES = GOLDEN + "output_agrees_with_transformers"

MUTATIONS = (
    Mutation(
        "packed texts see one another",
        "jlora/models/attention.py",
        "return (query == key) & (key != 0)",
        "return (query != 0) & (key != 0)",
        (ATTENTION + "packed_segments_equal_separate_texts",),
    ),
    Mutation(
        "padding counts in positions",
        "jlora/models/attention.py",
        "    valid = segments != 0\n    count",
        "    valid = segments >= 0\n    count",
        (GENERATE + "greedy_rows_of_different_lengths_equal_the_model_without_a_cache",),
    ),
    Mutation(
        "positions go on from one packed text to the next",
        "jlora/models/attention.py",
        "return jnp.maximum(count - 1 - jax.lax.cummax(starts, axis=1), 0)",
        "return jnp.maximum(count - 1, 0)",
        (
            ATTENTION + "packed_segments_equal_separate_texts",
            ATTENTION + "a_segment_after_padding_starts_at_position_0",
        ),
    ),
    Mutation(
        "a cache that is full is written over",
        "jlora/models/attention.py",
        "    if used + length > slots:\n",
        "    if False:\n",
        (ATTENTION + "a_full_cache_says_so",),
    ),
    Mutation(
        "a token may not see itself",
        "jlora/models/llama.py",
        "(distance >= 0)",
        "(distance > 0)",
        (AGREES + "[mistral_window]",),
    ),
    Mutation(
        "a window is a token too wide",
        "jlora/models/llama.py",
        "(inputs.distance < layer.window)",
        "(inputs.distance <= layer.window)",
        (AGREES + "[mistral_window]",),
    ),
    Mutation(
        "rotary planes are turned the other way",
        "jlora/models/rope.py",
        "[first * cosine - second * sine, second * cosine + first * sine]",
        "[first * cosine + second * sine, second * cosine - first * sine]",
        (AGREES + "[mistral_window]",),
    ),
    Mutation(
        "rotary halves are swapped",
        "jlora/models/rope.py",
        "[first * cosine - second * sine, second * cosine + first * sine]",
        "[first * cosine - second * sine, second * cosine - first * sine]",
        (AGREES + "[mistral_window]",),
    ),
    Mutation(
        "YaRN does not scale cosines",
        "jlora/models/rope.py",
        "return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor",
        "return jnp.cos(angles), jnp.sin(angles)",
        (AGREES + "[llama_yarn]",),
    ),
    Mutation(
        "Llama 3's waves are all stretched",
        "jlora/models/rope.py",
        "return keep * inverse + (1 - keep) * inverse / self.factor",
        "return inverse / self.factor",
        (AGREES + "[llama_llama3_biases]",),
    ),
    Mutation(
        "RoBERTa's positions begin at 0",
        "jlora/models/bert.py",
        'offset = whole(hf, "pad_token_id", least=0) + 1 if roberta else 0',
        "offset = 0",
        (AGREES + "[roberta]",),
    ),
    Mutation(
        "a classifier reads the last token, padding or not",
        "jlora/models/classify.py",
        "last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1].astype(bool), axis=1)",
        "last = jnp.full(mask.shape[0], mask.shape[1] - 1)",
        (CLASSIFY + "padding_on_either_side_changes_nothing",),
    ),
    Mutation(
        "every token is drawn by one key",
        "jlora/models/generate.py",
        "token = sampling.choose(logits, jax.random.fold_in(key, step))",
        "token = sampling.choose(logits, key)",
        (GENERATE + "every_token_is_drawn_by_a_key_of_its_own",),
    ),
    Mutation(
        "the temperature multiplies",
        "jlora/models/generate.py",
        "logits = logits / self.temperature",
        "logits = logits * self.temperature",
        (GENERATE + "the_temperature_divides_the_logits",),
    ),
    Mutation(
        "the nucleus ends before its border",
        "jlora/models/generate.py",
        "before = jnp.cumsum(probability, axis=-1) - probability",
        "before = jnp.cumsum(probability, axis=-1)",
        (GENERATE + "draws_stay_in_the_top_k_and_the_nucleus",),
    ),
    Mutation(
        "the end token is written",
        "jlora/models/generate.py",
        "        running = running & jnp.all(token[:, None] != ends, axis=1)\n"
        "        written = written.at[:, step].set(token)\n        lengths = lengths + running.astype(jnp.int32)\n",
        "        written = written.at[:, step].set(token)\n        lengths = lengths + running.astype(jnp.int32)\n"
        "        running = running & jnp.all(token[:, None] != ends, axis=1)\n",
        (GENERATE + "a_row_ends_before_its_end_token",),
    ),
    Mutation(
        "only the first end token ends a text",
        "jlora/models/generate.py",
        "jnp.all(token[:, None] != ends, axis=1)",
        "(token != ends[0])",
        (GENERATE + "a_stream_yields_what_is_generated_whatever_its_chunks",),
    ),
    Mutation(
        "16-bit infinities are finite",
        "jlora/models/finite.py",
        "(block & exponent) != exponent",
        "(block & exponent) <= exponent",
        (HOSTILE + "one_value_that_is_not_finite_is_found_wherever_it_is",),
    ),
    Mutation(
        "only the first block of a tensor is looked at",
        "jlora/models/finite.py",
        "for start in range(0, flat.size, _BLOCK):",
        "for start in range(0, min(flat.size, _BLOCK), _BLOCK):",
        (HOSTILE + "one_value_that_is_not_finite_is_found_wherever_it_is",),
    ),
    Mutation(
        "a quantized checkpoint is read as it is",
        "jlora/models/bitsandbytes.py",
        "    if not config:\n        return False\n",
        "    return False\n",
        (ERRORS + "an_unsupported_config_is_named",),
    ),
    Mutation(
        "another leaf's merged values are handed out",
        "jlora/models/merged.py",
        "if self not in self._last:",
        "if not self._last:",
        ("tests/interchange/test_commands.py::test_a_lazy_merge_has_the_shapes_dtypes_and_values_of_a_merge",),
    ),
    Mutation(
        "a spec's codes are those of another order of axes",
        "jlora/models/load.py",
        "yield matrix if site.in_axes < site.out_axes else matrix.T",
        "yield matrix",
        (QUANTIZED + "a_model_is_encoded_while_it_is_read_as_it_would_be_afterwards",),
    ),
    Mutation(
        "a name quantizes in float32 what the params have in 16 bits",
        "jlora/models/load.py",
        "code, dtype = code_at(site), np.dtype(site.dtype)",
        "code, dtype = code_at(site), np.dtype(np.float32)",
        (QUANTIZED + "a_model_is_encoded_while_it_is_read_as_it_would_be_afterwards",),
    ),
    Mutation(
        "a leaf is read whole before it is encoded",
        "jlora/models/load.py",
        "    return by_matrix(site, code, matrices())",
        "    return encoded(site, code, _read(checkpoint, made_of, site.shape, dtype, allow_nonfinite))",
        (QUANTIZED + "beside_what_is_stored_one_matrix_is_in_memory",),
    ),
    Mutation(
        "matrices are held until all are encoded",
        "jlora/core/tree/quantize.py",
        "    for number, w in enumerate(matrices):",
        "    for number, w in enumerate(list(matrices)):",
        (QUANTIZED + "beside_what_is_stored_one_matrix_is_in_memory",),
    ),
    Mutation(
        "what is not finite is encoded",
        "jlora/core/tree/quantize.py",
        "        if not finite:\n",
        "        if False:\n",
        (QUANTIZED + "values_that_are_not_finite_are_never_encoded",),
    ),
    Mutation(
        "a name quantizes heads",
        "jlora/models/quantized.py",
        "        return {ALL_LINEAR: quantize}",
        '        return {r".*/kernel": quantize}',
        (QUANTIZED + "a_name_means_all_linear_weights_but_the_head",),
    ),
    Mutation(
        "text is written by the function as it is",
        "jlora/models/generate.py",
        "    apply = runnable(apply, params)\n\n    def unfinished",
        "    def unfinished",
        (QUANTIZED + "text_is_written_from_codes_with_and_without_a_lift",),
    ),
    Mutation(
        "every layer is saved as the first",
        "jlora/models/quantized.py",
        "fields = {name: array[layer] for name, array in leaf.fields.items()}",
        "fields = {name: array[0] for name, array in leaf.fields.items()}",
        (QUANTIZED + "saving_decodes_layer_by_layer",),
    ),
    Mutation(
        "Flax says what is wrong with codes",
        "jlora/models/llama.py",
        "        refuse_codes(self.variables)\n",
        "",
        (QUANTIZED + "a_model_that_is_not_lifted_says_what_to_do",),
    ),
    Mutation(
        "blocks of bitsandbytes are not transposed",
        "jlora/models/bitsandbytes.py",
        "along = lambda array: array.reshape(rows, -1).T  # noqa: E731",
        "along = lambda array: array.reshape(-1, rows)  # noqa: E731",
        (BITSANDBYTES + "logits_are_those_of_the_weights_that_bitsandbytes_decodes",),
    ),
    Mutation(
        "blocks run over the ends of rows",
        "jlora/models/bitsandbytes.py",
        "            if columns % block:\n",
        "            if False:\n",
        (BITSANDBYTES + "a_damaged_weight_is_refused_by_name",),
    ),
    Mutation(
        "other levels than bitsandbytes' are read",
        "jlora/models/bitsandbytes.py",
        "if not np.array_equal(self.read(name), levels):",
        "if False:",
        (BITSANDBYTES + "a_damaged_weight_is_refused_by_name",),
    ),
    Mutation(
        "transformers takes plain layers for quantized ones",
        "jlora/models/bitsandbytes.py",
        '"llm_int8_skip_modules": skipped,',
        '"llm_int8_skip_modules": None,',
        (BITSANDBYTES + "a_plain_model_is_written_as_bitsandbytes_writes_it",),
    ),
    Mutation(
        "FP4's second zero is written with its sign",
        "jlora/models/bitsandbytes.py",
        "np.asarray(code.levels, np.float32) + 0",
        "np.asarray(code.levels, np.float32)",
        (BITSANDBYTES + "what_was_read_is_written_with_the_same_bytes",),
    ),
    Mutation(
        "layers in different forms take the first one's",
        "jlora/models/load.py",
        "        if len(codes) > 1:\n",
        "        if False:\n",
        (BITSANDBYTES + "layers_in_different_forms_are_not_stacked",),
    ),
    Mutation(
        "the dtype of a quantized model is that of its scales",
        "jlora/models/bitsandbytes.py",
        "return [name for name in super().names if name not in self._beside]",
        "return super().names",
        (BITSANDBYTES + "the_dtype_is_that_of_what_was_quantized",),
    ),
    Mutation(
        "a quantized model is quantized again",
        "jlora/models/load.py",
        "if stored and spec is not None:",
        "if False:",
        (BITSANDBYTES + "a_quantized_model_is_not_quantized_again",),
    ),
)
