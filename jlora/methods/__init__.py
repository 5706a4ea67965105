"""The methods: one file each, or one folder where a method allocates ranks; one line here."""

from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.alora import ALoRA as ALoRA
from jlora.methods.beamlora import BeamLoRA as BeamLoRA
from jlora.methods.chain import Chain as Chain
from jlora.methods.deeplora import DeepLoRA as DeepLoRA
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.elalora import ElaLoRA as ElaLoRA
from jlora.methods.full import Full as Full
from jlora.methods.gelora import GeLoRA as GeLoRA
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.lorta import LoRTA as LoRTA
from jlora.methods.mpo import MPO as MPO
from jlora.methods.prilora import PRILoRA as PRILoRA
from jlora.methods.raclora import RACLoRA as RACLoRA
from jlora.methods.rmlora import RMLoRA as RMLoRA
from jlora.methods.rows import Rows as Rows
from jlora.methods.shira import SHiRA as SHiRA
from jlora.methods.sora import SoRA as SoRA
from jlora.methods.tiedpair import TiedPair as TiedPair
from jlora.methods.vblora import VBLoRA as VBLoRA
from jlora.methods.vera import VeRA as VeRA
from jlora.methods.xgblora import XGBLoRA as XGBLoRA

# The classes alone: `from jlora.methods import *` must not bring their modules.
__all__ = [name for name, value in globals().items() if isinstance(value, type)]  # pyright: ignore[reportUnsupportedDunderAll]
