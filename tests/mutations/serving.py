"""Mutations of the serving engine, its rows and its store."""

from mutations.mutation import Mutation

ENGINE = "tests/serving/test_engine.py::test_"
STORE = "tests/serving/test_store.py::test_"
KINDS = "tests/serving/test_kinds.py::test_"

MUTATIONS = (
    Mutation(
        "rows of one cache all go on where the first does",
        "jlora/models/attention.py",
        "    if jnp.ndim(index):\n",
        "    index = jnp.ravel(index)[0]\n    if False:\n",
        ("tests/models/test_model_attention.py::test_rows_of_one_cache_need_not_be_equally_long",),
    ),
    Mutation(
        "a row sees the text that was there before",
        "jlora/serving/programs.py",
        "segments=jnp.where(known, cache.segments, 0)",
        "segments=cache.segments",
        (ENGINE + "each_request_gets_what_it_gets_alone",),
    ),
    Mutation(
        "numbers that are none stay in a row",
        "jlora/serving/programs.py",
        "jnp.where(known[:, None, None], getattr(cache, name), 0)",
        "getattr(cache, name)",
        (ENGINE + "numbers_that_are_none_end_one_request_and_leave_nothing_in_its_row",),
    ),
    Mutation(
        "a row keeps the adapter that it had first",
        "jlora/serving/loop.py",
        "if self._pages is not None and self._written[at] is not request.held:",
        "if self._pages is not None and self._written[at] is None:",
        (ENGINE + "each_request_gets_what_it_gets_alone",),
    ),
    Mutation(
        "what a row draws does not depend on its seed",
        "jlora/serving/drawing.py",
        "jax.random.key(seed), count)",
        "jax.random.key(0), count)",
        (ENGINE + "what_is_drawn_depends_on_the_seed_alone",),
    ),
    Mutation(
        "the adapter that was used last gives way",
        "jlora/serving/pages.py",
        "        self._kept.move_to_end(held)\n",
        "        self._kept.move_to_end(held, last=False)\n",
        (STORE + "the_least_recently_used_gives_way",),
    ),
    Mutation(
        "rows get the products of a kind that others have",
        "jlora/core/products/by_kind.py",
        "return jnp.where(spread, self._of_kind(x, w, fields, site, options), y)",
        "return self._of_kind(x, w, fields, site, options)",
        (KINDS + "rows_of_all_kinds_get_what_they_get_alone",),
    ),
    Mutation(
        "sparse adapters are filled up with a position that they have",
        "jlora/compose/kinds.py",
        "np.setdiff1d(np.arange(size, dtype=flat.dtype), each)[:more]",
        "np.resize(each, more)",
        (KINDS + "positions_that_fill_up_sparse_adapters_stand_once",),
    ),
    Mutation(
        "a prompt is read over the virtual tokens in front of it",
        "jlora/serving/loop.py",
        "start, row.read = row.virtual + row.read,",
        "start, row.read = row.read,",
        (KINDS + "rows_of_all_kinds_get_what_they_get_alone",),
    ),
)
