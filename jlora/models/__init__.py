"""Plain Linen models that read Hugging Face checkpoints and GGUF files; they know nothing of adapters."""

import importlib.resources
import pathlib

from jlora.models.attention import KVCache, empty_cache
from jlora.models.bert import Bert, BertConfig, mean_pool
from jlora.models.classifier_files import load_classifier, save_classifier
from jlora.models.classify import Classifier, last_pool, make_classifier
from jlora.models.gemma import Gemma, GemmaConfig
from jlora.models.generate import generate, stream
from jlora.models.generation_config import GenerationConfig, read_generation_config
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.load import load
from jlora.models.moe import Mixtral, MixtralConfig, Qwen3Moe, Qwen3MoeConfig
from jlora.models.peft_names import peft_names
from jlora.models.phi3 import Phi3, Phi3Config
from jlora.models.prefix_layout import PrefixLayout, peft_prefix
from jlora.models.rope import RopeConfig
from jlora.models.s2 import s2_attention
from jlora.models.save import save
from jlora.models.stretch import stretched
from jlora.models.tokenizer import load_tokenizer
from jlora.models.vit import ViT, ViTConfig

STORIES260K = pathlib.Path(str(importlib.resources.files(__name__) / "stories260k"))
"""The Hugging Face directory of the pretrained 260K-parameter Llama that comes with the package."""

__all__ = [
    "GPT2",
    "STORIES260K",
    "Bert",
    "BertConfig",
    "Classifier",
    "GPT2Config",
    "Gemma",
    "GemmaConfig",
    "GenerationConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Mixtral",
    "MixtralConfig",
    "Phi3",
    "Phi3Config",
    "PrefixLayout",
    "Qwen3Moe",
    "Qwen3MoeConfig",
    "RopeConfig",
    "ViT",
    "ViTConfig",
    "empty_cache",
    "generate",
    "last_pool",
    "load",
    "load_classifier",
    "load_tokenizer",
    "make_classifier",
    "mean_pool",
    "peft_names",
    "peft_prefix",
    "read_generation_config",
    "s2_attention",
    "save",
    "save_classifier",
    "stream",
    "stretched",
]
