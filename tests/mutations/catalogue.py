"""All mutations, those of the whole package."""

from mutations import bridges, compose, core, interchange, methods, models, runs, states, stored, training

MUTATIONS = tuple(
    mutation
    for module in (bridges, core, methods, states, stored, compose, interchange, models, runs, training)
    for mutation in module.MUTATIONS
)
