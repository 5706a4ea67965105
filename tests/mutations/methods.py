"""Faults in the methods: formulas, starts, scales, labels; and in what allocates their ranks or begins them anew."""

from mutations.mutation import Mutation

BOOSTING = "tests/chains/test_boosting.py::test_"
DEEP = "tests/test_deeplora.py::test_"
DORA = "tests/test_dora.py::test_"
HADAMARD = "tests/methods/test_hadamard.py::test_weight_and_gradients_are_those_of_the_formula"
INITS = "tests/test_weight_inits.py::test_"
DENSE = "tests/methods/test_dense_updates.py::test_"
FASTFOOD = "tests/methods/test_said.py::test_"
LORA = "tests/test_lora.py::test_"
PLUS = "tests/test_loraplus.py::test_"
DEEP_LINEAR, FA, PRODUCTS = (f"tests/methods/test_{name}.py::test_" for name in ("deeplinear", "lorafa", "products"))
RENEWAL = "tests/chains/test_renewal.py::test_"
ROTATED = "tests/methods/test_rotations.py::test_"
FROM_PEFT = "tests/interchange/test_from_peft.py::test_an_adapter_of_peft_computes_what_peft_computes"
RESTART = "tests/chains/test_restart.py::test_"
SHIRA = "tests/test_shira.py::test_"
STARTS = "tests/methods/test_starts.py::test_"
VERA = "tests/test_vera.py::test_"
TOGETHER = "tests/test_shared.py::test_"
LORTA, VBLORA, MPO, TIED = (f"tests/methods/test_{name}.py::test_" for name in ("lorta", "vblora", "mpo", "tiedpair"))
ADA, ALLOCATION, BEAM, ELA, ALORA, PRILORA, RM, SORA = (
    f"tests/allocate/test_{name}.py::test_"
    for name in ("adalora", "allocation", "beamlora", "elalora", "alora", "prilora", "rmlora", "sora")
)


def contract(method: str, check: str) -> tuple[str, ...]:
    """One check of a method's first case."""
    return (f"tests/contract/test_contract.py::test_contract[{method}-check_{check}]",)


PEFT_STEPS = "outputs_gradients_ten_steps_and_merged_weights_are_those_of_peft"
DENSE_UPDATES = (
    Mutation(
        "SineLoRA's gain is that of the other side",
        "jlora/methods/sinelora.py",
        'view.site.in_size if self.gain == "sqrt_in" else view.site.out_size',
        'view.site.out_size if self.gain == "sqrt_in" else view.site.in_size',
        (DENSE + "sinelora_is_the_sine_of_numpy_in_values_gradients_and_steps",),
    ),
    Mutation(
        "FourierFT's spectrum is not made even",
        "jlora/methods/fourierft.py",
        "even = even.at[-row % rows, -column % columns].add(values",
        "even = even.at[row, column].add(values",
        (DENSE + "fourierft_is_the_real_part_of_the_inverse_transform_of_numpy",),
    ),
    Mutation(
        "FourierFT takes its positions of the matrix as it is here",
        "jlora/methods/fourierft.py",
        "(chosen % rows * columns + chosen // rows)",
        "chosen",
        (DENSE + "the_positions_of_fourierft_are_the_first_of_the_permutation_of_torch",),
    ),
    Mutation(
        "RandLoRA pairs the rows of A by base",
        "jlora/methods/randlora.py",
        "b[:larger, :bases].reshape(",
        "b[:larger, :bases].swapaxes(1, 2).reshape(",
        (DENSE + PEFT_STEPS + "[randlora]",),
    ),
    Mutation(
        "a block of C3A is transposed",
        "jlora/methods/c3a.py",
        "(1, 2, 0, 3)",
        "(1, 3, 0, 2)",
        (DENSE + "a_block_of_c3a_is_a_circular_convolution",),
    ),
    Mutation(
        "a reflection is no reflection",
        "jlora/methods/spectral_tensor_train.py",
        "jnp.eye(columns, dtype=y.dtype) / 2",
        "jnp.eye(columns, dtype=y.dtype) / 3",
        (DENSE + "the_spectral_tensor_train_is_that_of_numpy",),
    ),
    Mutation(
        "the outputs of a tensor train come in the order of the inputs",
        "jlora/methods/spectral_tensor_train.py",
        'order = "ar,rmc->amc" if last else "ar,rmc->mac"',
        'order = "ar,rmc->amc"',
        (DENSE + "the_spectral_tensor_train_is_that_of_numpy",),
    ),
    Mutation(
        "SAID's map does not keep the norm of a padded matrix",
        "jlora/methods/said/fastfood.py",
        "jnp.sum(gaussian**2) * size",
        "jnp.sum(gaussian**2) * len(signs)",
        (FASTFOOD + "the_map_keeps_norms_on_average_and_differs_from_seed_to_seed",),
    ),
    Mutation(
        "SAID's scales are no part of its dimension",
        "jlora/methods/said/method.py",
        "jnp.zeros(self.dimension - matrices, ",
        "jnp.zeros(self.dimension, ",
        (FASTFOOD + "every_matrix_of_a_stack_has_its_map_and_takes_its_scale_from_the_budget",),
    ),
    Mutation(
        "a folder of PEFT's may lack the one tensor of a module",
        "jlora/interchange/read_table.py",
        "if last in MATRICES and name not in found and settings.targets(module):",
        "if False:",
        ("tests/interchange/test_stated_kinds.py::test_any_missing_tensor_is_named[c3a]",),
    ),
)

PRODUCTS_OF_FACTORS = (
    Mutation(
        "LoRA-Mini forgets its scale in the products",
        "jlora/methods/loramini.py",
        '(self.scale * view.params["b"]) @ view.frozen["b_aux"]',
        'view.params["b"] @ view.frozen["b_aux"]',
        (PRODUCTS + "outputs_gradients_and_ten_steps_are_those_of_the_formula_in_numpy",),
    ),
    Mutation(
        "MELoRA's blocks start as one",
        "jlora/methods/melora.py",
        "a = math.sqrt(self.blocks) * kaiming",
        "a = kaiming",
        (PRODUCTS + "factors_start_uniformly_as_in_the_references",),
    ),
    Mutation(
        "MELoRA's update is not cut to its blocks",
        "jlora/methods/melora.py",
        "b = jnp.where(diagonal[:, None] == columns, jnp.tile(b, (self.blocks, 1)), 0)",
        "b = jnp.tile(b, (self.blocks, 1))",
        (PRODUCTS + "melora_is_that_of_the_authors",),
    ),
    Mutation(
        "MultiLoRA's scales start at one",
        "jlora/methods/multilora.py",
        '"s": jnp.zeros(',
        '"s": jnp.ones(',
        (PRODUCTS + "the_scales_of_multilora_learn_first_and_never_decay",),
    ),
    Mutation(
        "MultiLoRA's scales decay",
        "jlora/methods/multilora.py",
        '"s": "vector"}',
        '"s": "b"}',
        (PRODUCTS + "the_scales_of_multilora_learn_first_and_never_decay",),
    ),
    Mutation(
        "GraLoRA's ranks and blocks change places",
        "jlora/methods/gralora.py",
        'jnp.einsum("nijq,nqjo->nijo", a, b)',
        'jnp.einsum("nijq,jqno->nijo", a, b)',
        (PRODUCTS + "gralora_is_that_of_peft",),
    ),
    Mutation(
        "GraLoRA's scale leaves its ordinary LoRA out",
        "jlora/methods/gralora.py",
        "return self.alpha / (self.rank + self.hybrid_rank)",
        "return self.alpha / self.rank",
        (PRODUCTS + "gralora_is_that_of_peft",),
    ),
    Mutation(
        "a deep linear network starts against the gradient",
        "jlora/methods/deeplinear.py",
        "first_directions(key, -statistics",
        "first_directions(key, statistics",
        (DEEP_LINEAR + "the_start_goes_where_a_step_of_gradient_descent_would",),
    ),
    Mutation(
        "the last factor of a deep linear network learns as the inner ones",
        "jlora/methods/deeplinear.py",
        'return {"f1": self.gamma, f"f{self.depth}": self.gamma}',
        'return {"f1": self.gamma}',
        (DEEP_LINEAR + "the_outer_factors_learn_at_gamma_times_the_rate",),
    ),
    Mutation(
        "LoRA-FA's gradient is divided by the scale once",
        "jlora/methods/lorafa/rule.py",
        "xp.linalg.inv(gram) / self.scale**2",
        "xp.linalg.inv(gram) / self.scale",
        (FA + "a_step_changes_each_matrix_as_the_weight_s_own_gradient_would_within_the_columns_of_a",),
    ),
    Mutation(
        "a rule does not get the constants",
        "jlora/optimize/optimizer.py",
        "bound = rule if given is None else given(adapted.frozen)",
        "bound = rule",
        (FA + "ten_steps_are_those_of_peft",),
    ),
)

FORMULAS = (
    Mutation(
        "LoRA's standard scale is that of rsLoRA",
        "jlora/methods/lora.py",
        'math.sqrt(rank) if scaling == "rslora" else rank)',
        "math.sqrt(rank))",
        (LORA + "rslora_is_lora_times_the_root_of_the_rank",),
    ),
    Mutation(
        "LoRA's scale is missing from its factors",
        "jlora/methods/lora.py",
        "return Factors(a, self.scale * b, dropout=self.dropout)",
        "return Factors(a, b, dropout=self.dropout)",
        contract("LoRA(rank=4)", "agree"),
    ),
    Mutation(
        "LoRA's factors have no dropout",
        "jlora/methods/lora.py",
        "return Factors(a, self.scale * b, dropout=self.dropout)",
        "return Factors(a, self.scale * b)",
        ("tests/test_dropout.py::test_a_key_drops_and_the_same_key_drops_the_same",),
    ),
    Mutation(
        "`a` is drawn by the number of outputs",
        "jlora/methods/lora.py",
        "bound = 1 / math.sqrt(shape[0])",
        "bound = 1 / math.sqrt(shape[1])",
        ("tests/test_peft_golden.py::test_starts_are_drawn_from_the_distributions_of_peft",),
    ),
    Mutation(
        "an embedding's LoRA starts as a product's",
        "jlora/methods/lora.py",
        'return "embedding" if site.kind == "gather" else "kaiming"',
        'return "kaiming"',
        (PLUS + "every_trained_array_is_in_the_group_that_loraplus_gives_it",),
    ),
    Mutation(
        "orthogonal factors lie in one half",
        "jlora/methods/lora.py",
        "return left @ q[0::2], q[1::2].T @ right",
        "return left @ q[0::2], q[0::2].T @ right",
        (INITS + "orthogonal_factors_are_drawn_as_peft_draws_them_and_cancel",),
    ),
    Mutation(
        "PiSSA's factors forget the scale",
        "jlora/methods/lora.py",
        "root = jnp.sqrt(sigma[: self.rank] / self.scale)",
        "root = jnp.sqrt(sigma[: self.rank])",
        (INITS + "pissas_factors_are_balanced_and_take_the_largest_singular_values_whatever_alpha",),
    ),
    Mutation(
        "a randomised SVD is no wider than the rank",
        "jlora/core/protocol/data_starts.py",
        "width = min(rank + 8 if width is None else width, *w.shape)",
        "width = min(rank if width is None else width, *w.shape)",
        (INITS + "the_randomised_svd_comes_as_close_as_its_iterations_let_it",),
    ),
    Mutation(
        "EVA takes the directions of the least variances",
        "jlora/core/protocol/data_starts.py",
        "first = vectors[:, ::-1][:, :number]",
        "first = vectors[:, :number]",
        (STARTS + "starts_gradients_and_six_steps_are_those_of_peft[eva]",),
    ),
    Mutation(
        "EVA looks at inputs around zero",
        "jlora/core/protocol/data_starts.py",
        "covariance - jnp.outer(mean, mean)",
        "covariance",
        (STARTS + "starts_gradients_and_six_steps_are_those_of_peft[eva]",),
    ),
    Mutation(
        "EVA gives out ranks as if there were one matrix",
        "jlora/methods/eva.py",
        "[: self.rank * matrices]",
        "[: self.rank]",
        (STARTS + "eva_gives_ranks_to_the_matrices_that_peft_gives_them",),
    ),
    Mutation(
        "CorDA keeps what the inputs use in neither mode",
        "jlora/core/protocol/data_starts.py",
        "slice(len(sigma) - rank, None) if least else slice(rank)",
        "slice(rank)",
        (STARTS + "of_isotropic_inputs_corda_is_pissa_up_to_the_balance_of_its_factors",),
    ),
    Mutation(
        "CorDA takes an inexact inverse",
        "jlora/core/protocol/data_starts.py",
        "(error >= 0.05)",
        "(error < 0)",
        (STARTS + "corda_doubles_the_damping_until_the_inverse_is_one",),
    ),
    Mutation(
        "LoRA-GA's scale forgets gamma",
        "jlora/core/protocol/data_starts.py",
        "w.shape[1] ** 0.25 / gamma**0.5",
        "w.shape[1] ** 0.25",
        (STARTS + "starts_gradients_and_six_steps_are_those_of_peft[lora_ga]",),
    ),
    Mutation(
        "LoRA-GA gives both factors the same triplets",
        "jlora/core/protocol/data_starts.py",
        '(every[:rank], every[rank:]) if direction == "ArB2r"',
        '(every[:rank], every[:rank]) if direction == "ArB2r"',
        (STARTS + "starts_gradients_and_six_steps_are_those_of_peft[lora_ga]",),
    ),
    Mutation(
        "factors from the weight run as large parts that cancel",
        "jlora/methods/lora.py",
        "jnp.concatenate([a - a0, a0], axis=1), jnp.concatenate([b, b - b0])",
        "jnp.concatenate([a, -a0], axis=1), jnp.concatenate([b, b0])",
        (INITS + "small_updates_of_large_factors_survive_sixteen_bits",),
    ),
    Mutation(
        "what was moved out of the base is not taken away in the weight",
        "jlora/methods/lora.py",
        'update -= view.frozen["a0"] @ view.frozen["b0"]',
        "pass",
        (INITS + "the_start_is_the_base_bit_for_bit_and_the_base_is_not_touched",),
    ),
    Mutation(
        "adapters of a 16-bit base are of 16 bits",
        "jlora/methods/lora.py",
        "return jnp.dtype(jnp.float32) if jnp.dtype(w.dtype).itemsize < 4 else w.dtype",
        "return w.dtype",
        contract("LoRA(rank=4)", "dtype"),
    ),
    Mutation(
        "a rank above the matrix's sides is taken",
        "jlora/methods/lora.py",
        "if self.rank > min(site.in_size, site.out_size):",
        "if self.rank > max(site.in_size, site.out_size):",
        ("tests/test_spec.py::test_a_rank_above_the_sides_names_path_shape_and_the_largest_rank",),
    ),
    Mutation(
        "DoRA's norm has a gradient",
        "jlora/methods/dora.py",
        "    norms = jax.lax.stop_gradient(norms)\n",
        "",
        contract("DoRA(inner=LoRA(rank=4))", "agree"),
    ),
    Mutation(
        "DoRA's norm of a low-rank weight misses half of the mixed part",
        "jlora/core/products/low_rank.py",
        "(2 * (a.T @ w) + (a.T @ a) @ b)",
        "((a.T @ w) + (a.T @ a) @ b)",
        contract("DoRA(inner=LoRA(rank=4))", "agree"),
    ),
    Mutation(
        "DoRA's norm of a sparse weight misses half of the mixed part",
        "jlora/core/products/sparse.py",
        "(2 * w[rows, columns] + values) * values",
        "(w[rows, columns] + values) * values",
        (SHIRA + "dora_goes_around_shira",),
    ),
    Mutation(
        "DoRA's norms run over the outputs",
        "jlora/methods/dora.py",
        "return jnp.sqrt(jnp.sum(w * w, axis=0))",
        "return jnp.sqrt(jnp.sum(w * w, axis=1))",
        (DORA + "a_merged_columns_length_is_the_magnitude",),
    ),
    Mutation(
        "DoRA divides by the norm of a column of zeros",
        "jlora/methods/dora.py",
        "jnp.where(norms > 0, norms, 1)",
        "norms",
        (DORA + "a_column_of_zeros_is_no_division_by_zero",),
    ),
    Mutation(
        "DoRA's magnitude decays",
        "jlora/methods/dora.py",
        '"m": "vector"}',
        '"m": "b"}',
        (PLUS + "every_trained_array_is_in_the_group_that_loraplus_gives_it",),
    ),
    Mutation(
        "VeRA's rank vector is missing from its factors",
        "jlora/methods/vera.py",
        "return Factors(a, d[:, None] * b * scale,",
        "return Factors(a, b * scale,",
        contract("VeRA(rank=4)", "agree"),
    ),
    Mutation(
        "VeRA's projections follow the user's generator",
        "jlora/methods/vera.py",
        'jax.random.key(self.projection_key, impl="threefry2x32")',
        "jax.random.key(self.projection_key)",
        (VERA + "the_projections_come_from_their_own_key_and_from_nothing_else",),
    ),
    Mutation(
        "VeRA's projections are as wide as the smallest leaf",
        "jlora/methods/vera.py",
        "rows, columns = max(site.in_size for site in sites),",
        "rows, columns = min(site.in_size for site in sites),",
        (VERA + "leaves_of_all_sizes_and_stacks_slice_one_pair",),
    ),
    Mutation(
        "SHiRA's scale is missing from its entries",
        "jlora/methods/shira.py",
        'return Sparse(view.frozen["index"], self.scale * view.params["values"])',
        'return Sparse(view.frozen["index"], view.params["values"])',
        (SHIRA + "a_number_times_the_weight_multiplies_its_entries",),
    ),
    Mutation(
        "SHiRA takes the smallest entries",
        "jlora/methods/shira.py",
        "stable=True, descending=True)",
        "stable=True, descending=False)",
        (SHIRA + "the_largest_entries_are_numpys_and_of_equal_ones_the_first",),
    ),
    Mutation(
        "SHiRA's offset is ignored",
        "jlora/methods/shira.py",
        "first, last = self.offset * k, (self.offset + 1) * k",
        "first, last = 0, k",
        (SHIRA + "adapters_with_offsets_of_one_key_are_disjoint",),
    ),
    Mutation(
        "SHiRA's snip ranks by the gradient alone",
        "jlora/methods/shira.py",
        'jnp.abs(w if self.mask == "weight" else w * statistics["gradient"])',
        'jnp.abs(w if self.mask == "weight" else statistics["gradient"])',
        (SHIRA + "gradient_and_snip_rank_what_the_calibration_batches_give",),
    ),
    Mutation(
        "Rows' factors add the rows to those that are there",
        "jlora/methods/rows.py",
        "return Factors(places, rows - view.w[at].astype(rows.dtype))",
        "return Factors(places, rows)",
        contract("Rows(indices=(0, 3))", "agree"),
    ),
    Mutation(
        "Deep LoRA's outer factors learn at the rate of the inner ones",
        "jlora/methods/deeplora.py",
        'return {"left": self.gamma, "right": self.gamma} if self.compressed and self.gamma else {}',
        "return {}",
        (DEEP + "rates_and_groups",),
    ),
    Mutation(
        "Deep LoRA's factors start at the size of one",
        "jlora/methods/deeplora.py",
        "draw = jax.nn.initializers.orthogonal(self.eps)",
        "draw = jax.nn.initializers.orthogonal()",
        (DEEP + "the_start_has_size_eps_to_the_depth",),
    ),
    Mutation(
        "Deep LoRA's images are drawn with signs that QR prefers",
        "jlora/methods/deeplora.py",
        "return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)",
        "return q",
        (DEEP + "the_images_under_the_wide_start_are_drawn_uniformly",),
    ),
    Mutation(
        "RAC-LoRA's random factor shrinks with the side and not with its root",
        "jlora/methods/raclora.py",
        "(side, self.rank), dtype) / math.sqrt(side)",
        "(side, self.rank), dtype) / side",
        ("tests/chains/test_sketches.py::test_gaussian_columns_have_about_unit_length_and_come_from_the_key",),
    ),
    Mutation(
        "XGBLoRA's layers that were not drawn act",
        "jlora/methods/xgblora.py",
        'b = self._plain.scale * view.frozen["mask"] * view.params["b"]',
        'b = self._plain.scale * view.params["b"]',
        (BOOSTING + "layers_that_are_not_drawn_do_not_move_by_a_bit",),
    ),
    Mutation(
        "GeLoRA's scale goes by the largest rank",
        "jlora/methods/gelora.py",
        "return self.alpha * len(ranks) / sum(ranks)",
        "return self.alpha / max(ranks)",
        (PRILORA + "gelora_takes_ranks_for_its_layers",),
    ),
    Mutation(
        "PRILoRA rounds halves down in the first layers",
        "jlora/methods/prilora/method.py",
        "return np.where(2 * np.arange(layers) < layers, up, down)",
        "return np.where(2 * np.arange(layers) < layers, down, up)",
        (PRILORA + "ranks_are_linear_and_add_up_exactly",),
    ),
    Mutation(
        "a gate is open beyond its layer's rank",
        "jlora/core/protocol/gated.py",
        "used = np.arange(width) < rank[..., None]",
        "used = np.arange(width) <= rank[..., None]",
        (PRILORA + "every_layer_has_its_rank_and_scale_and_padding_never_moves",),
    ),
    Mutation(
        "gates miss the scale where the matrix is tall",
        "jlora/core/protocol/gated.py",
        "return Factors(a, gates[:, None] * b, dropout=dropout)",
        "return Factors(a, gates[:, None] * b / self.scale, dropout=dropout)",
        contract("BeamLoRA(rank=4, alpha=8, temperature=1.0, steps=2000, interval=1000)", "agree"),
    ),
    Mutation(
        "the last finished link of a chain is forgotten",
        "jlora/methods/chain.py",
        '"link": link + 1,',
        '"link": link,',
        (RESTART + "a_chain_keeps_the_base_and_its_links_are_one_program",),
    ),
    Mutation(
        "a link of smaller rank trains all columns",
        "jlora/methods/chain.py",
        "return replace(found, b=found.b * used.astype(found.b.dtype)[:, None])",
        "return found",
        (RESTART + "a_link_of_smaller_rank_trains_and_keeps_that_rank_alone",),
    ),
    Mutation(
        "a class that changes the weight alone is used by its parent's factors",
        "jlora/core/protocol/method.py",
        '_WEIGHT = {*_FORMS, "weight", "update", "form"}',
        '_WEIGHT = {*_FORMS, "update", "form"}',
        (LORA + "a_derived_class_that_changes_the_weight_alone_is_used_by_that_weight",),
    ),
)

RATES = (
    Mutation(
        "vectors decay",
        "jlora/optimize/optimizer.py",
        '{**options, "weight_decay": 0.0} if decays else options',
        "options",
        (PLUS + "without_a_ratio_only_the_decay_of_vectors_differs_from_the_plain_optimizer",),
    ),
    Mutation(
        "`a` learns at the rate of `b`",
        "jlora/optimize/optimizer.py",
        '"a": (learning_rate, options),',
        '"a": (fast, options),',
        (PLUS + "b_moves_ratio_times_as_far_as_a",),
    ),
    Mutation(
        "embeddings learn as all else does",
        "jlora/optimize/optimizer.py",
        '"embedding": (embedding_learning_rate, options),',
        '"embedding": (learning_rate, options),',
        (PLUS + "embedding_factors_move_at_1e_6_or_at_the_rate_that_is_given",),
    ),
    Mutation(
        "a schedule is not scaled",
        "jlora/optimize/optimizer.py",
        "return lambda count: factor * rate(count)",
        "return rate",
        (PLUS + "a_schedule_is_scaled_too",),
    ),
    Mutation(
        "a field's own rate is ignored",
        "jlora/optimize/optimizer.py",
        'fields[name] = f"{fields[name]} x {factor!r}"',
        "pass",
        ("tests/test_prepare.py::test_a_rate_of_its_own_scales_the_fields_updates",),
    ),
    Mutation(
        "chains share one step count",
        "jlora/optimize/optimizer.py",
        'fields |= {name: f"{label}, link {number}" for',
        'fields |= {name: f"{label}, link" for',
        (RESTART + "each_chain_of_several_has_a_step_count_of_its_own",),
    ),
    Mutation(
        "a field without a group is no error",
        "jlora/optimize/optimizer.py",
        "if unlabelled := sorted(set(trained) - set(given)):",
        "if unlabelled := sorted(set(given) - set(trained) - set(given)):",
        (PLUS + "a_field_without_a_label_is_refused_by_name",),
    ),
    Mutation(
        "each site has a rank budget of its own",
        "jlora/optimize/optimizer.py",
        "for site in sites if site.method.optimizer_rule == rule))",
        "for site in sites if site.method.optimizer_rule == rule)[:1])",
        (ALLOCATION + "sites_with_equal_rules_share_a_budget_and_methods_mix",),
    ),
    Mutation(
        "a restart leaves the step count",
        "jlora/optimize/moments.py",
        "return node._replace(**{name: _COUNT for name in _COUNTS if getattr(node, name, None) == _OTHER})",
        "return node",
        (RENEWAL + "moments_of_restarted_leaves_begin_anew_with_their_counts",),
    ),
    Mutation(
        "pruning keeps the share that it should clear",
        "jlora/optimize/moments.py",
        "jax.random.fold_in(key, mark.number), 1 - renewal.prune, moment.shape)",
        "jax.random.fold_in(key, mark.number), renewal.prune, moment.shape)",
        (RENEWAL + "pruned_moments_keep_a_share_and_the_counts_go_on",),
    ),
    Mutation(
        "a mean is kept without its square",
        "jlora/optimize/moments.py",
        "place = (mark.number, moment.shape)",
        "place = (mark.number, moment.shape, id(moment))",
        (RENEWAL + "pruned_moments_keep_a_share_and_the_counts_go_on",),
    ),
    Mutation(
        "the smallest moments are kept",
        "jlora/optimize/moments.py",
        "jnp.argsort(-rows, axis=-1, stable=True)",
        "jnp.argsort(rows, axis=-1, stable=True)",
        (RENEWAL + "pruned_moments_keep_a_share_and_the_counts_go_on",),
    ),
    Mutation(
        "the new link's factors are drawn as the last one's",
        "jlora/optimize/restart.py",
        "in starts_of(link.sites, ends, key).items():",
        "in starts_of(link.sites, ends, jax.random.key(0)).items():",
        (RESTART + "a_link_is_folded_into_the_base_and_the_next_begins_as_adapterize_would",),
    ),
    Mutation(
        "a chain that is full goes on",
        "jlora/optimize/restart.py",
        "if links is not None and done + 1 >= links:",
        "if links is not None and done >= links:",
        (
            RESTART + "a_chain_keeps_the_base_and_its_links_are_one_program",
            RESTART + "what_cannot_begin_anew_is_refused",
        ),
    ),
    Mutation(
        "an array that is another leaf too dies with the restart",
        "jlora/optimize/restart.py",
        "jnp.copy(leaf) if shared[id(leaf)] > 1 else leaf for",
        "leaf for",
        (RESTART + "what_is_shared_or_of_numpy_survives_a_restart",),
    ),
    Mutation(
        "the rate after a restart rises one step late",
        "jlora/optimize/restart.py",
        "(since + 1) / warmup * schedule(last + warmup)",
        "since / warmup * schedule(last + warmup)",
        (RENEWAL + "the_jagged_schedule_rises_anew_after_each_restart",),
    ),
    Mutation(
        "events of one step share a key",
        "jlora/optimize/events.py",
        "jax.random.fold_in(jax.random.fold_in(key, step), number)",
        "jax.random.fold_in(key, step)",
        ("tests/test_events.py::test_events_happen_at_their_steps_once_for_all_leaves_that_share_them",),
    ),
    Mutation(
        "an event happens at every step",
        "jlora/optimize/events.py",
        "in events_of(adapted).items() if event.due(step)]",
        "in events_of(adapted).items()]",
        ("tests/test_events.py::test_events_happen_at_their_steps_once_for_all_leaves_that_share_them",),
    ),
)

RANKS = (
    Mutation(
        "AdaLoRA's budget falls as a square",
        "jlora/optimize/allocate/budget.py",
        "max(left, 0.0) ** 3 + last)",
        "max(left, 0.0) ** 2 + last)",
        (ADA + "budgets_are_those_of_peft_and_are_met_exactly",),
    ),
    Mutation(
        "of equal scores all pass",
        "jlora/optimize/allocate/budget.py",
        "    order = positions(jnp.where(among, -values, jnp.inf).ravel())\n"
        "    return (order < count).reshape(values.shape) & among",
        "    least = jnp.sort(jnp.where(among, values, -jnp.inf).ravel())[::-1][jnp.maximum(count - 1, 0)]\n"
        "    return (values >= least) & among",
        (ADA + "ties_never_break_the_budget",),
    ),
    Mutation(
        "the budget falls a step late",
        "jlora/optimize/allocate/budget.py",
        "jnp.sum(jnp.asarray(falls) <= step, dtype=jnp.int32)",
        "jnp.sum(jnp.asarray(falls) < step, dtype=jnp.int32)",
        (ADA + "budgets_are_those_of_peft_and_are_met_exactly", ELA + "fewer_ranks_move_as_the_run_goes_on"),
    ),
    Mutation(
        "sensitivities are not smoothed",
        "jlora/optimize/allocate/scores.py",
        "beta1 * old + (1 - beta1) * new for",
        "new for",
        (ADA + "averages_are_those_of_peft",),
    ),
    Mutation(
        "a score sums what it should average",
        "jlora/optimize/allocate/scores.py",
        "jnp.nan_to_num(e + jnp.mean(a, axis=-2)",
        "jnp.nan_to_num(e + jnp.sum(a, axis=-2)",
        (ADA + "every_step_of_a_schedule_leaves_the_parameters_that_peft_leaves",),
    ),
    Mutation(
        "a step whose gradient is not finite is not counted",
        "jlora/optimize/allocate/transform.py",
        "            state.skipped + ~sound,\n",
        "            state.skipped,\n",
        (ALLOCATION + "skipped_steps_are_counted_and_the_ranks_that_learn_stay",),
    ),
    Mutation(
        "what AdaLoRA gave up comes back after the last allocation",
        "jlora/methods/adalora/rule.py",
        "settled = t >= phases.last",
        "settled = t < 0",
        (ADA + "masks_are_constant_after_the_last_allocation",),
    ),
    Mutation(
        "SoRA's gates keep their size above the threshold",
        "jlora/methods/sora/rule.py",
        "jnp.maximum(jnp.abs(gate) - threshold, 0)",
        "jnp.where(jnp.abs(gate) > threshold, jnp.abs(gate), 0)",
        (SORA + "the_threshold_is_the_proximal_step_and_closes_more_gates_the_larger_it_is",),
    ),
    Mutation(
        "SoRA's penalty is not shared by the gates",
        "jlora/methods/sora/rule.py",
        "share = self.l1 / sum(factor.e.size for factor in factors)",
        "share = self.l1",
        (SORA + "gates_of_every_step_are_those_of_a_loop_of_adamw_and_the_threshold",),
    ),
    Mutation(
        "BeamLoRA copies the best ranks as they are now",
        "jlora/methods/beamlora/rule.py",
        "return jnp.where(mask, triplets.taken(old, index, axis), new)",
        "return jnp.where(mask, triplets.taken(new, index, axis), new)",
        (BEAM + "values_and_moments_of_every_step_are_those_of_a_loop_over_the_ranks",),
    ),
    Mutation(
        "BeamLoRA's gates do not add up to the rank",
        "jlora/methods/beamlora/rule.py",
        "return score.shape[-1] * jax.nn.softmax(wide / temperature, axis=-1)",
        "return jax.nn.softmax(wide / temperature, axis=-1)",
        (BEAM + "gates_sum_to_the_rank_also_where_they_are_nearly_one_hot",),
    ),
    Mutation(
        "RM-LoRA's first step is masked",
        "jlora/methods/rmlora/rule.py",
        "(budget.positions(noise) < self.updated) | (step == 1)",
        "(budget.positions(noise) < self.updated)",
        (RM + "masks_have_exactly_k_ranks_after_the_first_step_each_rank_as_often",),
    ),
    Mutation(
        "RM-LoRA's ranks that are not updated move",
        "jlora/methods/rmlora/rule.py",
        "return _masked(updates, masks, sites) if self.freeze else updates,",
        "return updates,",
        (RM + "ranks_that_are_not_updated_stay_to_the_bit_where_they_are_frozen",),
    ),
    Mutation(
        "PRILoRA prunes by size alone",
        "jlora/methods/prilora/rule.py",
        "jnp.abs(a) * norms[..., None])",
        "jnp.abs(a))",
        (PRILORA + "values_averages_and_moments_are_those_of_a_loop",),
    ),
    Mutation(
        "what PRILoRA froze counts as new",
        "jlora/methods/prilora/rule.py",
        "importance = jnp.where(frozen, -1, jnp.abs(a)",
        "importance = jnp.where(frozen, jnp.inf, jnp.abs(a)",
        (PRILORA + "each_group_keeps_exactly_what_it_should_and_mode_decides_what_comes_after",),
    ),
    Mutation(
        "ElaLoRA takes a module's last rank",
        "jlora/methods/elalora/rule.py",
        "jnp.minimum(per_module, held - 1)[:, None]",
        "jnp.minimum(per_module, held)[:, None]",
        (ELA + "the_total_never_changes_and_no_module_loses_its_last_rank",),
    ),
    Mutation(
        "a rank that ElaLoRA gives starts as large as the others",
        "jlora/methods/elalora/rule.py",
        "jnp.minimum(least, _START).astype(factor.e.dtype)",
        "jnp.ones_like(least)",
        (ELA + "growing_changes_the_weight_by_next_to_nothing",),
    ),
    Mutation(
        "moments of what was taken away stay",
        "jlora/optimize/moments.py",
        "jnp.where(mask, jnp.zeros_like(moment) if new is None else new, moment)",
        "jnp.where(mask, moment if new is None else new, moment)",
        (SORA + "ranks_given_up_for_good_lose_their_moments",),
    ),
)

PRODUCTS = (
    Mutation(
        "LoHa's products are added",
        "jlora/methods/loha.py",
        'update = (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"])',
        'update = (p["a1"] @ p["b1"]) + (p["a2"] @ p["b2"])',
        (HADAMARD,),
    ),
    Mutation(
        "HiRA's update is LoRA's",
        "jlora/methods/hira.py",
        "return w + w * (a @ b)",
        "return w + a @ b",
        (HADAMARD,),
    ),
)

SHARED = (
    Mutation(
        "LoRTA leaves a leaf's kind out",
        "jlora/methods/lorta.py",
        'shared["c_h"] * shared["c_m"][view.frozen["kind"]] * shared["c_l"]',
        'shared["c_h"] * shared["c_l"]',
        (LORTA + "merged_weights_are_those_of_the_reference",),
    ),
    Mutation(
        "layers of one stack are kinds of their own",
        "jlora/core/protocol/layers.py",
        'layer[-1].rstrip("0123456789")',
        "layer[-1]",
        (LORTA + "merged_weights_are_those_of_the_reference",),
    ),
    Mutation(
        "VB-LoRA mixes by the logits themselves",
        "jlora/methods/vblora.py",
        "jax.nn.softmax(largest)",
        "largest",
        (VBLORA + "merged_weights_are_those_of_peft",),
    ),
    Mutation(
        "VB-LoRA's bank learns as fast as its logits",
        "jlora/methods/vblora.py",
        'return {"bank": 0.1}',
        'return {"bank": 1.0}',
        (VBLORA + "outputs_gradients_and_steps_are_those_of_peft",),
    ),
    Mutation(
        "MPO takes the first kind's central core",
        "jlora/methods/mpo.py",
        '["central"], view.frozen["kind"])',
        '["central"], 0 * view.frozen["kind"])',
        (MPO + "an_entry_is_the_product_of_the_matrices_that_its_digits_choose_also_where_the_matrix_is_cut",),
    ),
    Mutation(
        "the second of a square pair has the update of the first",
        "jlora/methods/tiedpair.py",
        "jnp.where(turned, b.T, a), jnp.where(turned, a.T, b)",
        "a, b",
        (TIED + "square_matrices_are_paired_by_patterns_and_pairs_of_other_sizes_take_their_part",),
    ),
    Mutation(
        "rates of shared arrays are left out",
        "jlora/optimize/optimizer.py",
        "_multiply(fields, method.shared_rates())",
        "_multiply(fields, {})",
        (TOGETHER + "the_optimizer_gives_them_their_groups_and_rates",),
    ),
    Mutation(
        "a leaf that trains nothing of its own is lost in loading",
        "jlora/disk/adapters.py",
        'paths.insert(shapes["params"], site.keys, {})',
        "pass",
        (TOGETHER + "they_are_saved_loaded_and_counted_once",),
    ),
    Mutation(
        "a restart leaves shared trained arrays in the folded weight and in the adapter",
        "jlora/optimize/restart.py",
        'if paths.lookup(adapted.params, (SHARED, drawers.get(site.method, ""))):',
        "if False:",
        (TOGETHER + "a_restart_refuses_them_and_so_does_a_chain",),
    ),
    Mutation(
        "shared trained arrays are not counted",
        "jlora/analysis/explain.py",
        "_values(own + shared)",
        "_values(own)",
        (TOGETHER + "they_are_saved_loaded_and_counted_once",),
    ),
)

ROTATIONS = (
    Mutation(
        "the last term of OFT's series counts twice",
        "jlora/methods/oft/method.py",
        "        total += jnp.matmul(power, s, precision=EXACT)",
        "        total += 2 * jnp.matmul(power, s, precision=EXACT)",
        (ROTATED + "oft_is_the_product_with_its_blocks_one_by_one[5]",),
    ),
    Mutation(
        "OFT's exact blocks turn as its series does",
        "jlora/methods/oft/method.py",
        "dtype=s.dtype) + s, s)",
        "dtype=s.dtype) - s, -s)",
        (ROTATED + "oft_is_the_product_with_its_blocks_one_by_one[0]",),
    ),
    Mutation(
        "OFT's rotated input is rounded to 16 bits",
        "jlora/methods/oft/method.py",
        "return product(turned(x.astype(change.dtype), change))",
        "return product(turned(x.astype(change.dtype), change).astype(x.dtype))",
        (ROTATED + "a_small_change_reaches_the_output_of_a_16_bit_base[OFT(block=4)]",),
    ),
    Mutation(
        "COFT's bound is that of one block",
        "jlora/methods/oft/rule.py",
        "bound = eps / math.sqrt(2 * q.shape[-2])",
        "bound = eps / math.sqrt(2)",
        (FROM_PEFT + "[oft_bounded]",),
    ),
    Mutation(
        "HRA's reflections come in the other order",
        "jlora/methods/hra.py",
        "self.reflected(view.w.astype(u.dtype).T, u[:, ::-1]).T",
        "self.reflected(view.w.astype(u.dtype).T, u).T",
        (ROTATED + "hra_reflects_the_weight_by_one_column_after_the_other[3]",),
    ),
    Mutation(
        "HRA's columns all start apart",
        "jlora/methods/hra.py",
        "return self.rank % 2 == 0 and not self.gram_schmidt",
        "return False",
        (ROTATED + "reflections_start_in_equal_pairs_and_where_they_can_not_as_another_function",),
    ),
    Mutation(
        "BOFT's first factor comes last",
        "jlora/methods/boft.py",
        "for number in reversed(range(self.depth)):",
        "for number in range(self.depth):",
        (FROM_PEFT + "[boft_deep]",),
    ),
    Mutation(
        "BOFT's factors all reach equally far",
        "jlora/methods/boft.py",
        "halves = (2, 2**number, change.shape[-1] // 2)",
        "halves = (2, 2, change.shape[-1] // 2)",
        (ROTATED + "boft_is_the_product_of_its_factors_with_the_first_one_next_to_the_weight[2-3-16]",),
    ),
    Mutation(
        "IA3 leaves the bias as it was",
        "jlora/methods/ia3.py",
        'leaf.astype(view.params["l"].dtype) * view.params["l"] for',
        "leaf for",
        (FROM_PEFT + "[ia3]",),
    ),
    Mutation(
        "RoAd turns the other way",
        "jlora/methods/road.py",
        "jnp.asarray([[-1], [1]], theta.dtype)",
        "jnp.asarray([[1], [-1]], theta.dtype)",
        (FROM_PEFT + "[road]",),
    ),
)

BOTTLENECK = "tests/methods/test_bottleneck.py::test_"
ADAPTER = "tests/methods/test_hadamard_adapter.py::test_"
GLORA = "tests/methods/test_glora.py::test_"
ACTING = (
    Mutation(
        "a network behind the product does not see the bias",
        "jlora/methods/bottleneck.py",
        'z = z + view.beside["bias"].astype(z.dtype)',
        "pass",
        (BOTTLENECK + "output_gradients_and_ten_steps_are_those_of_the_authors_layers[output]",),
    ),
    Mutation(
        "a bottleneck's dropout drops nothing",
        "jlora/methods/bottleneck.py",
        "drop(z, self.dropout, view.key)",
        "drop(z, self.dropout, None)",
        (BOTTLENECK + "dropout_drops_the_input_of_the_network_alone",),
    ),
    Mutation(
        "a bottleneck's learned scale stays what it was",
        "jlora/methods/bottleneck.py",
        'view.params.get("scale", self.scale)',
        "self.scale",
        (BOTTLENECK + "output_gradients_and_ten_steps_are_those_of_the_authors_layers[output]",),
    ),
    Mutation(
        "a Hadamard adapter leaves the bias of the function as it is",
        "jlora/methods/hadamard.py",
        '"bias": g * bias + b if',
        '"bias": bias + b if',
        (ADAPTER + "output_gradients_and_ten_steps_are_those_of_numpy[output]",),
    ),
    Mutation(
        "a Hadamard adapter on inputs merges its shift by the changed weight",
        "jlora/methods/hadamard.py",
        "bias + b @ view.w.astype(g.dtype)",
        "bias + b @ self.weight(view)",
        (ADAPTER + "output_gradients_and_ten_steps_are_those_of_numpy[input]",),
    ),
    Mutation(
        "GLoRA shifts by the changed weight",
        "jlora/methods/glora/method.py",
        "self._shift(self._supports(view), lambda z: z @ w, view)",
        "self._shift(self._supports(view), lambda z: z @ self.weight(view), view)",
        (GLORA + "all_432_configurations_do_what_the_authors_layer_does_and_start_and_merge_exactly",),
    ),
    Mutation(
        "an entangled vector is the last row of its factor",
        "jlora/methods/glora/method.py",
        'low[1][0] if name in "ab" else low[1][:, 0]',
        'low[1][-1] if name in "ab" else low[1][:, 0]',
        (GLORA + "all_432_configurations_do_what_the_authors_layer_does_and_start_and_merge_exactly",),
    ),
    Mutation(
        "the search for a configuration scores some twice",
        "jlora/methods/glora/search.py",
        "if drawn.tobytes() not in seen and (",
        "if (",
        (GLORA + "the_search_finds_what_scores_best_within_its_limit_and_compiles_once",),
    ),
    Mutation(
        "the search for a configuration goes beyond its limit",
        "jlora/methods/glora/search.py",
        "drawing.size(drawn) <= settings.limit",
        "drawing.size(drawn) <= 2 * settings.limit",
        (GLORA + "the_search_finds_what_scores_best_within_its_limit_and_compiles_once",),
    ),
    Mutation(
        "a search that goes on draws otherwise than one that did not end",
        "jlora/methods/glora/search.py",
        "np.random.default_rng([*seed, search.generation + 1])",
        "np.random.default_rng([*seed, search.generation + (1 if resume is None else 2)])",
        (GLORA + "the_search_is_the_same_with_the_same_key_and_goes_on_from_where_it_was",),
    ),
    Mutation(
        "PEFT's zeros may be anything",
        "jlora/interchange/read_table.py",
        "if np.any(folder.read(key)):",
        "if False:",
        (GLORA + "fixed_configurations_go_to_peft_and_back_and_its_zeros_must_be_zeros",),
    ),
)

MUTATIONS = (*DENSE_UPDATES, *PRODUCTS_OF_FACTORS, *FORMULAS, *RATES, *RANKS, *PRODUCTS, *SHARED, *ROTATIONS, *ACTING)
