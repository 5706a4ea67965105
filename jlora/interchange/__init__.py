"""Adapters in PEFT's format, both ways."""

from jlora.interchange.load import load_peft as load_peft
from jlora.interchange.save import PeftReport as PeftReport
from jlora.interchange.save import save_peft as save_peft
from jlora.models.torch_parameter import TorchParameter as TorchParameter
