"""All mutations, those of the whole package."""

from mutations import (
    bridges,
    compose,
    continual,
    core,
    experiments,
    interchange,
    methods,
    models,
    prompts,
    runs,
    serving,
    serving_http,
    states,
    stored,
    training,
)

MUTATIONS = tuple(
    mutation
    for module in (
        bridges,
        core,
        methods,
        continual,
        states,
        stored,
        compose,
        interchange,
        models,
        prompts,
        runs,
        serving,
        serving_http,
        training,
        experiments,
    )
    for mutation in module.MUTATIONS
)
