"""Prompts both ways between PEFT and jlora: folders, and the networks with their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_training_steps as training
import pytest

import jlora
from jlora import models

pytestmark = pytest.mark.parity
GOLDEN = training.BASE.parent
IDS = np.arange(20).reshape(2, 10) % 50
EMBEDDING, KEYS = r".*embed_tokens/embedding", r".*/(k|v)_proj/kernel"
SPECS = {
    "PROMPT_TUNING": {EMBEDDING: jlora.PromptTuning(3)},
    "P_TUNING": {EMBEDDING: jlora.PTuning(3, encoder="lstm", hidden=4)},
    "PREFIX_TUNING": {KEYS: jlora.PrefixTuning(3, hidden=4, width=5)},
}


@functools.cache
def loaded(base):
    model, params = models.load(GOLDEN / base)
    return model, params, jlora.sites(lambda params, ids: model.apply({"params": params}, ids), params, IDS)


def torch_base(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(GOLDEN / base, dtype="float32").eval()


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()[:, -IDS.shape[1] :]


def places(base):
    model = loaded(base)[0]
    return {"names": models.peft_names(model), "prefix": models.peft_prefix(model)}


def logits(base, adapted):
    return jlora.prompted(jlora.lift(loaded(base)[0].apply))({"params": adapted}, IDS)


# llama_yarn has rotary positions with a factor, qwen2 biases of keys and values, and groups of queries; gemma2 multiplies its
# embeddings, behind which PEFT puts prompts.
@pytest.mark.parametrize("base", ["llama_yarn", "qwen2", "gemma2"])
@pytest.mark.parametrize("peft_type", SPECS)
def test_peft_computes_what_jlora_wrote(base, peft_type, tmp_path):
    from peft import PeftModel

    _, params, sites = loaded(base)
    adapted = jlora.adapterize(params, SPECS[peft_type], sites=sites)
    report = jlora.save_peft(tmp_path / "prompt", adapted, **places(base), task_type="CAUSAL_LM")
    assert report.peft_type == peft_type
    theirs = PeftModel.from_pretrained(torch_base(base), tmp_path / "prompt")
    np.testing.assert_allclose(logits(base, adapted), torch_logits(theirs), rtol=2e-4, atol=2e-4)
    again = jlora.load_peft(tmp_path / "prompt", params, **places(base))
    np.testing.assert_allclose(logits(base, again), logits(base, adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peft_type", SPECS)
def test_jlora_computes_what_peft_wrote(peft_type, tmp_path):
    import peft
    import torch

    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    config = {
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**options),
        "P_TUNING": lambda: peft.PromptEncoderConfig(encoder_hidden_size=4, **options),
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=4, **options),
    }[peft_type]()
    theirs = peft.get_peft_model(torch_base("qwen2"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = jlora.load_peft(tmp_path / "theirs", loaded("qwen2")[1], **places("qwen2"))
    np.testing.assert_allclose(logits("qwen2", adapted), torch_logits(theirs), rtol=2e-4, atol=2e-4)


def copied(module, prefix):
    """A torch linear layer or LSTM as jlora's arrays."""
    import torch

    found = {}
    if isinstance(module, torch.nn.Linear):
        return {f"{prefix}_kernel": module.weight.T, f"{prefix}_bias": module.bias}
    for n in range(module.num_layers):
        for way, end in (("forward", ""), ("backward", "_reverse")):
            get = lambda name, n=n, end=end: getattr(module, f"{name}_l{n}{end}")
            found[f"{prefix}_{n}_{way}_input"] = get("weight_ih").T
            found[f"{prefix}_{n}_{way}_hidden"] = get("weight_hh").T
            found[f"{prefix}_{n}_{way}_bias"] = get("bias_ih") + get("bias_hh")
    return found


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_encoders_train_as_those_of_peft(encoder):
    """Three steps of gradient descent from the same arrays: equal losses, and equal rows that the encoder makes at last."""
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_hidden_size=4,
        encoder_reparameterization_type=encoder.upper(),
    )
    theirs = peft.get_peft_model(torch_base("qwen2"), config).eval()
    network = theirs.prompt_encoder["default"]
    arrays = {"prompt": network.embedding.weight}
    linears = [layer for layer in network.mlp_head if isinstance(layer, torch.nn.Linear)]
    for n, layer in enumerate(linears):
        arrays |= copied(layer, f"linear_{n}")
    if encoder == "lstm":
        arrays |= copied(network.lstm_head, "lstm")
    arrays = {name: jnp.asarray(array.detach().numpy()) for name, array in arrays.items()}
    model, params, sites = loaded("qwen2")
    adapted = jlora.adapterize(params, {EMBEDDING: jlora.PTuning(3, encoder, hidden=4)}, sites=sites)
    start = adapted.params["embed_tokens"]["embedding"]
    assert {name: array.shape for name, array in start.items()} == {name: a.shape for name, a in arrays.items()}
    adapted = adapted.replace(params={"embed_tokens": {"embedding": arrays}})
    apply, tx = jlora.prompted(jlora.lift(model.apply)), optax.sgd(0.3)

    def loss(params):
        found = apply({"params": adapted.replace(params=params)}, IDS)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(found, IDS[:, 1:]).mean()

    descent = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.3)
    state, params, step = tx.init(adapted.params), adapted.params, jax.jit(jax.value_and_grad(loss))
    for _ in range(3):
        # With labels PEFT would also have the last virtual token predict the first real one.
        found = theirs(input_ids=torch.tensor(IDS)).logits[:, -IDS.shape[1] : -1]
        wanted = torch.nn.functional.cross_entropy(found.flatten(0, 1), torch.tensor(IDS[:, 1:]).flatten())
        value, gradient = step(params)
        np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
        descent.zero_grad()
        wanted.backward()
        descent.step()
        # torch's two biases each take the gradient that their sum has, so that the sum goes twice as far.
        twice = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * (2 if "lstm" in path[-1].key and "bias" in path[-1].key else 1), gradient
        )
        updates, state = tx.update(twice, state)
        params = optax.apply_updates(params, updates)
    bare = jlora.without_encoder(adapted.replace(params=params)).params["embed_tokens"]["embedding"]["prompt"]
    made = theirs.get_prompt_embedding_to_save("default").numpy()
    np.testing.assert_allclose(bare, made, rtol=1e-4, atol=1e-5)
