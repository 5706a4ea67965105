"""Ten steps of AdamW in jlora, from a PEFT adapter."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from models_data import quick_jit

import jlora
from jlora import models, paths

# The name jlora.optimizer is the function.
with_rules = importlib.import_module("jlora.optimize.optimizer").with_rules

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_training"
BASE = Path(__file__).parents[1] / "models" / "golden" / "llama_yarn"
STEPS, RATE, DECAY = 10, 0.01, 0.01
DECAYS = {"olora": 0.0, "pissa": 0.0}
ADALORA = {"target": 2, "steps": STEPS, "start_steps": 2, "final_steps": 3, "interval": 2, "orthogonality": 0.3}


def names():
    """The cases of `make_peft_training.py`."""
    return sorted(folder.name for folder in GOLDEN.iterdir())


def expected(name):
    return json.loads((GOLDEN / name / "losses.json").read_text())


def adapters(folder):
    """Model and adapters of a PEFT folder on the tiny Llama."""
    model, params = models.load(BASE)
    return model, jlora.load_peft(folder, params, models.peft_names(model))


def scheduled(adapted):
    """AdaLoRA's adapters with the phases of the run, which PEFT's folder gives to nobody but PEFT."""
    sites = tuple(replace(site, method=replace(site.method, **ADALORA)) for site in adapted.plan.sites)
    return adapted.replace(plan=replace(adapted.plan, sites=sites))


def train(folder, name, tokens):
    """As `train` of `make_peft_training.py`: losses, and for AdaLoRA the ranks that are left."""
    model, adapted = adapters(folder)
    adapted = scheduled(adapted) if name == "adalora" else adapted
    tokens = jnp.asarray(tokens)
    lifted = jlora.lift(lambda params: model.apply({"params": params}, tokens))

    def loss(p):
        logits = lifted(adapted.replace(params=p))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    # torch's AdamW, as it stands there, decays every array.
    tx = with_rules(adapted, optax.adamw(RATE, weight_decay=DECAYS.get(name, DECAY)))

    def step(carry, _):
        p, state = carry
        value, gradient = jax.value_and_grad(loss)(p)
        updates, state = tx.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), value

    run = quick_jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=STEPS))
    (p, _), losses = run(adapted.params)
    return [*losses.tolist(), float(quick_jit(loss)(p))], ranks(adapted.replace(params=p))


def ranks(adapted):
    """The number of ranks left, by torch module."""
    found = {}
    for site in adapted.plan.sites:
        fields = paths.lookup(adapted.params, site.keys)
        for layer, e in enumerate(fields.get("e", ())):
            module = ".".join(site.keys[1:-1])
            found[f"model.layers.{layer}.{module}"] = int((e != 0).sum())
    return found
