"""Both sides live: what jlora writes PEFT computes, what PEFT writes jlora computes, and both train alike.

Needs torch, transformers and PEFT: `pip install -e ".[test,parity]"`, then `pytest -m parity`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft_training_steps as training
import pytest

import jlora
from jlora import models
from jlora.core.protocol.method import stated_kind
from jlora.disk import catalog
from jlora.models import families

pytestmark = pytest.mark.parity
GOLDEN = training.BASE.parent
TOKENS = np.arange(20).reshape(2, 10) % 50
ATTENTION, LINEAR = r".*/(q|v)_proj/kernel", r".*/(q|v|o|gate|down)_proj/kernel"
LORA = jlora.LoRA(rank=4, alpha=6)
TIED_ROWS = jlora.Axes("in out", jlora.Rows((3, 7)), "gather")
# name: (base, spec)
EXPORTS = {
    "lora": ("llama_yarn", {LINEAR: LORA}),
    "rslora and patterns": (
        "qwen3",
        {ATTENTION: jlora.LoRA(4, 6.0, "rslora"), r".*/o_proj/kernel": jlora.LoRA(2, 3.0)},
    ),
    "dora": ("llama_yarn", {LINEAR: jlora.DoRA(LORA)}),
    "olora": ("qwen3", {LINEAR: jlora.LoRA(4, 6.0, init="olora")}),
    "pissa": ("llama_yarn", {LINEAR: jlora.LoRA(4, 6.0, init="pissa")}),
    "adalora": ("llama_yarn", {LINEAR: jlora.AdaLoRA(4, 2, 6.0, steps=10)}),
    "vera": ("llama_yarn", {LINEAR: jlora.VeRA(8)}),
    "shira": ("llama_yarn", {LINEAR: jlora.SHiRA("weight", rank=2)}),
    "head and norms": ("qwen3", {ATTENTION: LORA, "lm_head/kernel": jlora.Full(), ".*layernorm/scale": jlora.Full()}),
    "biases": ("llama_llama3_biases", {ATTENTION: LORA, ".*/(q|down)_proj/bias": jlora.Full()}),
    "embedding": ("llama_yarn", {ATTENTION: LORA, "embed_tokens/embedding": LORA}),
    "rows": ("llama_yarn", {ATTENTION: LORA, "embed_tokens/embedding": jlora.Rows((3, 7))}),
    "tied embedding": (
        "llama_linear_tied",
        {ATTENTION: LORA, "embed_tokens/embedding": jlora.Axes("in out", LORA, "gather")},
    ),
    "tied rows": ("llama_linear_tied", {ATTENTION: LORA, "embed_tokens/embedding": TIED_ROWS}),
    "tied head": ("llama_linear_tied", {ATTENTION: LORA, "embed_tokens/embedding": jlora.Full()}),
    "layers": ("llama_yarn", {LINEAR: jlora.Layers(LORA, (0, 2))}),
    "layers of dora": ("llama_yarn", {ATTENTION: jlora.Layers(jlora.DoRA(LORA), (1,))}),
    "layers of hira": ("qwen3", {ATTENTION: jlora.Layers(jlora.HiRA(2), (1,))}),
    "lntuning": ("llama_yarn", {".*norm/scale": jlora.LNTuning()}),
    "gemma2": ("gemma2", {LINEAR: LORA, ".*norm/scale": jlora.Full()}),
    "gemma3": ("gemma3", {LINEAR: LORA, "embed_tokens/embedding": jlora.Axes("in out", LORA, "gather")}),
    "phi3": ("phi3", {".*/(qkv|gate_up|o|down)_proj/kernel": LORA}),
    "gpt2": ("gpt2_scaled", {".*/(c_attn|c_fc|c_proj)/kernel": LORA, ".*/ln_1/scale": jlora.Full()}),
    "mixtral": ("mixtral", {ATTENTION: LORA, ".*/experts/(gate_up|down)_proj": LORA}),
    "qwen3 moe": ("qwen3moe", {ATTENTION: LORA, ".*/experts/down_proj": LORA, ".*/mlp/gate/kernel": jlora.Full()}),
    "routers": (
        "mixtral",
        {".*/mlp/gate/kernel": jlora.LoRA(2, dropout=0.1), ".*/experts/gate_up_proj": LORA, ATTENTION: LORA},
    ),
    "every linear weight of experts": ("qwen3moe", {jlora.ALL_LINEAR: LORA}),
    "encoder": ("bert", {"encoder/.*/(query|value|dense)/kernel": LORA}),
    "encoder's norms": ("bert", {".*/query/kernel": LORA, ".*LayerNorm/(scale|bias)": jlora.Full()}),
}
# Methods that state their place in PEFT, by their first case.
STATED = {name.lower(): cls for name, cls in catalog.methods().items() if stated_kind(cls) is not None}
EXPORTS |= {name: ("llama_yarn", {LINEAR: cls.CASES[0]}) for name, cls in STATED.items() if name not in EXPORTS}


def moved(adapted):
    """Adapters away from their start, so that the test is not about zeros."""
    keys = iter(jax.random.split(jax.random.key(3), 1000))
    return adapted.replace(
        params=jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape) / 20, adapted.params)
    )


def in_jax(model, adapted, lift=True):
    def function(params, tokens):
        return model.apply({"params": params}, tokens)

    return np.asarray((jlora.lift(function) if lift else function)(adapted, jnp.asarray(TOKENS)))


def torch_base(name):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if name.startswith("bert") else AutoModelForCausalLM
    return kind.from_pretrained(name if "/" in str(name) else GOLDEN / name, dtype=torch.float32)


def in_torch(model):
    import torch

    tokens, kind = torch.as_tensor(TOKENS), getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    # PEFT's outermost model doesn't pass the tasks of rows on.
    run, told = (model.base_model, {"task_ids": tokens[:, 0] * 0}) if kind == "POLY" else (model, {})
    model.eval()
    with torch.no_grad():
        out = run(tokens, **told)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def peft_model(name, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(torch_base(name), folder)


def adapted_of(base, spec):
    model, params = models.load(GOLDEN / base)
    sites = jlora.sites(lambda p, x: model.apply({"params": p}, x), params, jnp.asarray(TOKENS))
    return model, params, moved(jlora.adapterize(params, spec, sites=sites))


@pytest.mark.parametrize("name", STATED)
def test_a_stated_place_names_settings_that_peft_has_with_its_defaults(name):
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = stated_kind(STATED[name])
    theirs = vars(PEFT_TYPE_TO_CONFIG_MAPPING[kind.peft_type]())
    settings = {setting.name: setting.default for setting in kind.settings if setting.listed is None}
    assert {name: theirs[name] for name in settings} == settings
    others = {name for each in kind.settings for name in (each.name, each.pattern or each.name)}
    assert others | set(kind.only) | set(kind.training) | set(kind.unused) <= set(theirs)


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.filterwarnings("error:.*[Mm]issing.*", "error:.*[Uu]nexpected.*", "error:.*inconsisten.*")
def test_peft_computes_what_jlora_computes_with_what_jlora_wrote(name, tmp_path):
    base, spec = EXPORTS[name]
    model, params, adapted = adapted_of(base, spec)
    jlora.save_peft(tmp_path / "out", adapted, models.peft_names(model))
    expected = in_jax(model, adapted)
    np.testing.assert_allclose(in_torch(peft_model(base, tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(in_jax(model, params, lift=False), expected, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_loftq_is_that_of_peft(steps):
    """With a coarse grid as the code, since PEFT's own are bitsandbytes'; its `loftq_init` needs a GPU, its factors do not."""
    import torch
    from peft.utils.loftq_utils import _low_rank_decomposition

    w, added = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 24)
    for _ in range(steps):
        quantized = torch.round(4 * (w - added)) / 4
        found = _low_rank_decomposition(w - quantized, reduced_rank=5)
        added = found["L"] @ found["R"]
    spec = {"w": jlora.LoRA(rank=5, alpha=5, init="residual")}  # PEFT does not divide by a scale of another size
    params = {"w": w.numpy().T}
    base, prepared = jlora.loftq(params, spec, lambda w: jnp.round(4 * w) / 4, steps)
    fields = jlora.adapterize(base, spec, prepared=prepared).params["w"]
    np.testing.assert_array_equal(base["w"], quantized.numpy().T)
    np.testing.assert_allclose(fields["a"] @ fields["b"], added.numpy().T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.abs(fields["a"]), np.abs(found["R"].numpy().T), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "rslora and patterns", "olora", "adalora", "vera", "layers"])
def test_peft_computes_the_same_with_a_folder_for_servers(name, tmp_path):
    base, spec = EXPORTS[name]
    model, _, adapted = adapted_of(base, spec)
    jlora.save_peft(tmp_path / "out", adapted, models.peft_names(model), profile="serving")
    np.testing.assert_allclose(
        in_torch(peft_model(base, tmp_path / "out")), in_jax(model, adapted), rtol=1e-5, atol=1e-5
    )


def lora_config(**options):
    from peft import LoraConfig

    return LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], **options)


IMPORTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 9}},
    "saved modules": {"modules_to_save": ["lm_head", "model.norm"]},
    "layers": {"layers_to_transform": [0, 2]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stacked", "by layer"])
@pytest.mark.parametrize("name", IMPORTS)
def test_jlora_computes_what_peft_computes_with_what_peft_wrote(name, scan_layers, tmp_path):
    import torch
    from peft import get_peft_model

    theirs = get_peft_model(torch_base("llama_yarn"), lora_config(**IMPORTS[name]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 20)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(GOLDEN / "llama_yarn", scan_layers=scan_layers)
    adapted = jlora.load_peft(tmp_path, params, models.peft_names(model))
    # PEFT took the top singular vectors out of the base in float32; here they are found again.
    tolerance = 1e-4 if name == "pissa" else 1e-5
    np.testing.assert_allclose(in_jax(model, adapted), in_torch(theirs), rtol=tolerance, atol=tolerance)


# name: (base, options of PEFT's LoraConfig)
FAMILIES = {
    "gemma2": ("gemma2", {"target_modules": ["q_proj", "o_proj", "up_proj"]}),
    "gemma3": ("gemma3", {"target_modules": "all-linear", "use_dora": True}),
    "phi3": ("phi3_longrope", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "mixtral": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "qwen3 moe": ("qwen3moe", {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    "routers": (
        "qwen3moe",
        {
            "target_modules": ["o_proj"],
            "target_parameters": ["mlp.gate.weight"],
            "rank_pattern": {"mlp.gate.weight": 2},
        },
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_jlora_computes_what_peft_computes_on_every_family(name, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    base, options = FAMILIES[name]
    theirs = get_peft_model(torch_base(base), LoraConfig(r=3, lora_alpha=5, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 20)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(GOLDEN / base)
    adapted = jlora.load_peft(tmp_path, params, models.peft_names(model))
    np.testing.assert_allclose(in_jax(model, adapted), in_torch(theirs), rtol=1e-4, atol=1e-4)
    assert not np.allclose(in_jax(model, params, lift=False), in_torch(theirs), atol=1e-3)


# Keys of configs that say nothing of what the model computes.
HARMLESS = {
    "architectures", "attention_dropout", "attn_pdrop", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "initializer_range", "model_type",
    "output_router_logits", "pad_token_id", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "transformers_version", "use_cache", "_sliding_window_pattern", "_name_or_path",
    "pretraining_tp",  # the same product in pieces
    "reorder_and_upcast_attn",  # attention in 32 bits, as jlora's is in any case
}  # fmt: skip
# Keys that say nothing in one type of model, as these configs have them: windows are off, positions are not stretched.
HARMLESS_HERE = {
    "bert": {"tie_word_embeddings"},
    "roberta": {"tie_word_embeddings"},
    "gemma": {"query_pre_attn_scalar"},
    "phi3": {"original_max_position_embeddings"},
    "qwen2": {"sliding_window", "layer_types", "max_window_layers"},
    "qwen3": {"sliding_window", "layer_types", "max_window_layers"},
    "qwen3_moe": {"sliding_window"},
    "vit": {"encoder_stride", "label2id"},  # of a head that draws hidden pixels; id2label the other way around
}


class Watched(dict):
    """A dict that knows which of its keys were asked for."""

    def __init__(self, content):
        super().__init__(content)
        self.seen = set()

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def items(self):
        self.seen |= {"rope_parameters", "rope_scaling", "rope_theta"}  # read under their names beside
        return super().items()


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists()))
def test_every_key_of_a_config_of_transformers_is_read_or_says_nothing(name):
    import transformers

    content = transformers.AutoConfig.from_pretrained(GOLDEN / name).to_dict()
    hf = Watched(content)
    families.FAMILIES[content["model_type"]].config.from_hf(hf)
    usual = transformers.PreTrainedConfig().to_dict()
    of_all_models = {key for key, value in content.items() if key in usual and value == usual[key]}
    here = HARMLESS_HERE.get(content["model_type"], set())
    assert set(content) - hf.seen - HARMLESS - here - of_all_models == set()


@pytest.mark.parametrize("name", training.names())
def test_ten_steps_of_adamw_have_equal_losses_on_both_sides(name, tmp_path):
    import make_peft_training as theirs

    model = theirs.start(name, tmp_path / "start", training.BASE)
    expected = theirs.train(model, name)
    losses, ranks = training.train(tmp_path / "start", name, theirs.tokens().tolist())
    np.testing.assert_allclose(losses, expected["losses"], rtol=2e-5, atol=2e-5)
    assert ranks == expected["ranks"]
    np.testing.assert_allclose(training.expected(name)["losses"], expected["losses"], rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "shira", "tied head"])
def test_transformers_loads_the_merged_model_with_equal_logits(name, tmp_path):
    from jlora.models.merged import lazily_merged

    base, spec = EXPORTS[name]
    model, _, adapted = adapted_of(base, spec)
    models.save(tmp_path / "out", model, lazily_merged(adapted), source=GOLDEN / base, max_shard_bytes=20_000)
    np.testing.assert_allclose(
        in_torch(torch_base(str(tmp_path / "out"))), in_jax(model, adapted), rtol=1e-5, atol=1e-5
    )
