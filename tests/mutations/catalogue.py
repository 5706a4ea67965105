"""All mutations, those of the whole package."""

from mutations import compose, core, interchange, methods, models, states, stored, training

MUTATIONS = tuple(
    mutation
    for module in (core, methods, states, stored, compose, interchange, models, training)
    for mutation in module.MUTATIONS
)
