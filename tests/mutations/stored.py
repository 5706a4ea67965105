"""Faults in the codes of bases: levels, scales, packing, second levels; and where they say that they can be cut."""

from mutations.mutation import Mutation

GOLDEN, CODES, BITS = (f"tests/stored/test_{name}.py::test_" for name in ("bitsandbytes", "codes", "bits"))
BNB = GOLDEN + "codes_scales_and_decoded_values_are_those_of_bitsandbytes"
SECOND = GOLDEN + "the_second_level_is_that_of_bitsandbytes"
AROUND = GOLDEN + "the_second_level_around_the_offset_of_bitsandbytes_is_its_own"
AGAIN = BITS + "a_decoded_matrix_has_the_same_fields_again"
PART = CODES + "a_part_of_the_fields_is_a_part_of_the_matrix"
UNIFORM = CODES + "uniform_is_that_of_loftq"
FLOAT8 = CODES + "float8_is_the_nearest_of_its_dtype"
LEAVES = "tests/stored/test_stored_leaves.py::test_"
ROOM = LEAVES + "a_step_takes_no_more_memory_than_on_a_float32_base"
MESH = LEAVES + "on_a_mesh_fields_are_cut_as_the_leaf_in_whole_blocks"
FINITE = CODES + "numbers_near_the_ends_of_float32_make_none_that_are_not_finite"

MUTATIONS = (
    Mutation(
        "blocks are taken to a level by division",
        "jlora/stored/blockwise.py",
        "blocks * to_most(scales)[:, None]",
        "blocks / scales[:, None]",
        (BNB,),
    ),
    Mutation(
        "scales of 0 are divided by",
        "jlora/stored/scaling.py",
        "jnp.where(scales > least, (1 / scales) * most, 0.0)",
        "(1 / scales) * most",
        (BNB,),
    ),
    Mutation(
        "a reciprocal that is finite overflows when it is multiplied",
        "jlora/stored/scaling.py",
        "least = most * float(",
        "least = float(",
        (FINITE,),
    ),
    Mutation(
        "Int8 divides 127 by the scale",
        "jlora/stored/scaling.py",
        "return jnp.where(scales > least, (1 / scales) * most, 0.0)",
        "return jnp.where(scales > least, most / scales, 0.0)",
        (GOLDEN + "int8_is_that_of_llm_int8",),
    ),
    Mutation(
        "of two equally near levels the upper is taken",
        "jlora/stored/blockwise.py",
        "(x > middle)",
        "(x >= middle)",
        (BNB,),
    ),
    Mutation(
        "FP4's codes are ranks",
        "jlora/stored/blockwise.py",
        "return rank if (order == np.arange(len(levels))).all() else jnp.asarray(order, jnp.uint8)[rank]",
        "return rank",
        (BNB,),
    ),
    Mutation(
        "the first input of a byte lies in the lowest bits",
        "jlora/stored/packing.py",
        "parts[:, n] << (8 - bits * (n + 1))",
        "parts[:, n] << (bits * n)",
        (CODES + "the_first_input_lies_in_the_highest_bits", CODES + "three_bits_lie_in_three_planes"),
    ),
    Mutation(
        "the planes of three bits begin with the lowest",
        "jlora/stored/packing.py",
        "_joined((codes >> (2 - plane)) & 1, 1)",
        "_joined((codes >> plane) & 1, 1)",
        (CODES + "three_bits_lie_in_three_planes",),
    ),
    Mutation(
        "planes of bits say that they run along the inputs",
        "jlora/stored/packing.py",
        '3: ("", "in", "out")',
        '3: ("in", "in", "out")',
        (PART,),
    ),
    Mutation(
        "a code's highest bit chooses first",
        "jlora/stored/packing.py",
        "zip(remaining[::2], remaining[1::2])",
        "zip(remaining[: len(remaining) // 2], remaining[len(remaining) // 2 :])",
        (BNB,),
    ),
    Mutation(
        "nested scales are of scales in the matrix's own order",
        "jlora/stored/double.py",
        "flat = (scales - offset).T.reshape(-1)",
        "flat = (scales - offset).reshape(-1)",
        (AROUND,),
    ),
    Mutation(
        "the second level is read in the matrix's own order",
        "jlora/stored/double.py",
        "[: codes.size].reshape(codes.shape[::-1]).T",
        "[: codes.size].reshape(codes.shape)",
        (SECOND,),
    ),
    Mutation(
        "the second level is read with a fused multiplication and addition",
        "jlora/stored/double.py",
        "jax.lax.optimization_barrier(jnp.asarray(DYNAMIC_MAP)[codes] * nested)",
        "jnp.asarray(DYNAMIC_MAP)[codes] * nested",
        (BITS + "with_all_optimizations_the_bits_are_the_same",),
    ),
    Mutation(
        "the ends of the dynamic map's numbers are those of float64",
        "jlora/stored/double.py",
        "up, down = first + step * np.arange(count + 1), last - step * np.arange(count, -1, -1)",
        "up = down = np.linspace(0.1, 1, count + 1)",
        (GOLDEN + "the_numbers_that_codes_stand_for_are_those_of_bitsandbytes",),
    ),
    Mutation(
        "the offset of scales is their largest",
        "jlora/stored/double.py",
        "offset = total(scales.T.reshape(-1)) / scales.size",
        "offset = jnp.max(scales)",
        (SECOND,),
    ),
    Mutation(
        "a matrix with a second level can be cut",
        "jlora/stored/double.py",
        "return frozenset() if self.double else super().local",
        "return super().local",
        (PART, CODES + "what_has_a_second_level_cannot_be_cut"),
    ),
    Mutation(
        "Uniform's levels are formed with a fused multiplication and addition",
        "jlora/stored/uniform.py",
        "jax.lax.optimization_barrier(shares * width)",
        "shares * width",
        (BITS + "with_all_optimizations_the_bits_are_the_same",),
    ),
    Mutation(
        "Int8 is decoded in an order that moves its scales",
        "jlora/stored/int8.py",
        'fields["codes"].astype(jnp.float32) * unit(127) * fields["scales"][None]',
        'fields["codes"].astype(jnp.float32) * fields["scales"][None] * unit(127)',
        (AGAIN,),
    ),
    Mutation(
        "Int8 has one scale for the matrix",
        "jlora/stored/int8.py",
        "jnp.max(jnp.abs(w), axis=0)",
        "jnp.broadcast_to(jnp.max(jnp.abs(w)), w.shape[1:])",
        (GOLDEN + "int8_is_that_of_llm_int8",),
    ),
    Mutation(
        "Int4 is decoded around 7",
        "jlora/stored/int4.py",
        "(packing.unpack(packed, self.bits) - 8)",
        "(packing.unpack(packed, self.bits) - 7)",
        (CODES + "int4_is_a_scaled_whole_number",),
    ),
    Mutation(
        "Float8 takes weights as they are",
        "jlora/stored/float8.py",
        "(w * to_most(scales, self._most)[None])",
        "w",
        (FLOAT8,),
    ),
    Mutation(
        "the least numbers of Float8 are read as if they had a leading 1",
        "jlora/stored/float8.py",
        "(byte & 127) < (1 << mantissa)",
        "(byte & 127) < 0",
        (CODES + "every_finite_byte_of_float8_is_widened_exactly",),
    ),
    Mutation(
        "Uniform clips at one standard deviation",
        "jlora/stored/uniform.py",
        "spread = 2 * jnp.sqrt",
        "spread = jnp.sqrt",
        (UNIFORM,),
    ),
    Mutation(
        "Uniform's deviation is that of a population",
        "jlora/stored/uniform.py",
        "/ (w.size - 1))",
        "/ w.size)",
        (UNIFORM,),
    ),
    Mutation(
        "Uniform's levels begin at 0",
        "jlora/stored/uniform.py",
        "optimization_barrier(shares * width) + low",
        "optimization_barrier(shares * width)",
        (UNIFORM,),
    ),
    Mutation(
        "decoded weights are kept for the backward pass",
        "jlora/core/walk/decoding.py",
        "return jax.checkpoint(tied)",
        "return tied",
        (ROOM + "[True-False]",),
    ),
    Mutation(
        "codes are not tied to what they are multiplied with",
        "jlora/core/walk/decoding.py",
        "codes = jax.lax.optimization_barrier((operands, codes))[1]",
        "codes = [*codes]",
        (ROOM + "[False-True]",),
    ),
    Mutation(
        "a code's levels are constants in a loop",
        "jlora/stored/blockwise.py",
        "packed, levels = jax.lax.optimization_barrier((packed, jnp.asarray(self.levels, jnp.float32)))",
        "levels = jnp.asarray(self.levels, jnp.float32)",
        (ROOM + "[True-False]",),
    ),
    Mutation(
        "a leaf in the form of a code ignores the number that multiplies it",
        "jlora/core/walk/weight.py",
        "return _times(weight, over_batch(lambda view: view.w, weight))",
        "return over_batch(lambda view: view.w, weight)",
        (LEAVES + "every_use_equals_that_of_the_decoded_base",),
    ),
    Mutation(
        "a matrix that can't be decoded in parts is cut",
        "jlora/core/walk/weight.py",
        "weight.method.local & weight.code.local",
        "weight.method.local",
        (MESH,),
    ),
    Mutation(
        "a cut into a block is made",
        "jlora/core/tree/placement.py",
        "for name, array in leaf.fields.items():",
        "for name, array in ():",
        (MESH,),
    ),
    Mutation(
        "values that are not finite are kept as a code",
        "jlora/core/tree/quantize.py",
        "if not finite:",
        "if False:",
        (LEAVES + "quantize_refuses",),
    ),
    Mutation(
        "adapters are loaded on a base in another form",
        "jlora/disk/adapters.py",
        "if (before := made_on.get(path)) != (after := now.get(path)):",
        "if (before := made_on.get(path)) is (after := now.get(path)) is path:",
        (LEAVES + "saved_adapters_know_the_form_of_their_base",),
    ),
    Mutation(
        "rows of a leaf in the form of a code are looked up",
        "jlora/core/walk/lookup.py",
        "if weight.code is not None:",
        "if False:",
        (LEAVES + "leaves_kept_as_a_code_are_no_arrays",),
    ),
    Mutation(
        "a leaf in the form of a code is adapted by other roles than its own",
        "jlora/core/tree/spec.py",
        "if isinstance(leaf, Stored) and tuple(roles) != leaf.roles:",
        "if False:",
        (LEAVES + "leaves_kept_as_a_code_are_no_arrays",),
    ),
    Mutation(
        "a finished link goes into a base in the form of a code",
        "jlora/optimize/restart.py",
        "elif isinstance(leaf := leaves[site.keys], Stored):",
        "elif False and isinstance(leaf := leaves[site.keys], Stored):",
        (LEAVES + "what_merges_into_the_base_is_refused_and_chains_beside_it_go_on",),
    ),
    Mutation(
        "what qwix keeps is computed in float32",
        "jlora/stored/qwix.py",
        "values = values.astype(scales.dtype)",
        "values = values.astype(jnp.float32)",
        ("tests/stored/test_qwix.py::test_values_are_those_of_qwix_and_are_lifted",),
    ),
    Mutation(
        "tiles of folded axes are taken to lie together",
        "jlora/stored/qwix.py",
        "return not cut or all(",
        "return True or all(",
        ("tests/stored/test_qwix.py::test_tiles_that_do_not_lie_together_when_axes_are_folded_are_spread",),
    ),
)
