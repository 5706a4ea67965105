"""Plain Linen models that read Hugging Face checkpoints; they know nothing of adapters."""

import importlib.resources
import pathlib

from jlora.models.attention import KVCache, empty_cache
from jlora.models.bert import Bert, BertConfig, mean_pool
from jlora.models.classifier_files import load_classifier, save_classifier
from jlora.models.classify import Classifier, last_pool, make_classifier
from jlora.models.generate import generate, stream
from jlora.models.generation_config import GenerationConfig, read_generation_config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.load import load
from jlora.models.peft_names import peft_names
from jlora.models.rope import RopeConfig
from jlora.models.save import save
from jlora.models.tokenizer import load_tokenizer

STORIES260K = pathlib.Path(str(importlib.resources.files(__name__) / "stories260k"))
"""The Hugging Face directory of the pretrained 260K-parameter Llama that comes with the package."""

__all__ = [
    "STORIES260K",
    "Bert",
    "BertConfig",
    "Classifier",
    "GenerationConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "RopeConfig",
    "empty_cache",
    "generate",
    "last_pool",
    "load",
    "load_classifier",
    "load_tokenizer",
    "make_classifier",
    "mean_pool",
    "peft_names",
    "read_generation_config",
    "save",
    "save_classifier",
    "stream",
]
