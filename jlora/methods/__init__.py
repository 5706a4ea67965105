"""The methods: one file each, one line here."""

from jlora.methods.dora import DoRA as DoRA
from jlora.methods.full import Full as Full
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.vera import VeRA as VeRA
