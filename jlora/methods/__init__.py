"""The methods: one file each, or one folder where a method allocates ranks; one line here."""

from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.adamix import AdaMix as AdaMix
from jlora.methods.alora import ALoRA as ALoRA
from jlora.methods.beamlora import BeamLoRA as BeamLoRA
from jlora.methods.boft import BOFT as BOFT
from jlora.methods.bottleneck import Bottleneck as Bottleneck
from jlora.methods.c3a import C3A as C3A
from jlora.methods.chain import Chain as Chain
from jlora.methods.deeplinear import DeepLinear as DeepLinear
from jlora.methods.deeplora import DeepLoRA as DeepLoRA
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.dropout import Dropout as Dropout
from jlora.methods.elalora import ElaLoRA as ElaLoRA
from jlora.methods.eva import EVA as EVA
from jlora.methods.fourierft import FourierFT as FourierFT
from jlora.methods.full import Full as Full
from jlora.methods.gelora import GeLoRA as GeLoRA
from jlora.methods.glora import GLoRA as GLoRA
from jlora.methods.gralora import GraLoRA as GraLoRA
from jlora.methods.hadamard import Hadamard as Hadamard
from jlora.methods.hira import HiRA as HiRA
from jlora.methods.hra import HRA as HRA
from jlora.methods.ia3 import IA3 as IA3
from jlora.methods.layers import Layers as Layers
from jlora.methods.lntuning import LNTuning as LNTuning
from jlora.methods.loha import LoHa as LoHa
from jlora.methods.lokr import LoKr as LoKr
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.lorafa import LoRAFA as LoRAFA
from jlora.methods.loramini import LoRAMini as LoRAMini
from jlora.methods.lorta import LoRTA as LoRTA
from jlora.methods.melora import MELoRA as MELoRA
from jlora.methods.miss import MiSS as MiSS
from jlora.methods.mora import MoRA as MoRA
from jlora.methods.mpo import MPO as MPO
from jlora.methods.multilora import MultiLoRA as MultiLoRA
from jlora.methods.oft import OFT as OFT
from jlora.methods.prilora import PRILoRA as PRILoRA
from jlora.methods.raclora import RACLoRA as RACLoRA
from jlora.methods.randlora import RandLoRA as RandLoRA
from jlora.methods.rmlora import RMLoRA as RMLoRA
from jlora.methods.road import RoAd as RoAd
from jlora.methods.rows import Rows as Rows
from jlora.methods.said import SAID as SAID
from jlora.methods.shira import SHiRA as SHiRA
from jlora.methods.sinelora import SineLoRA as SineLoRA
from jlora.methods.sora import SoRA as SoRA
from jlora.methods.spectral_tensor_train import SpectralTensorTrain as SpectralTensorTrain
from jlora.methods.tiedpair import TiedPair as TiedPair
from jlora.methods.vblora import VBLoRA as VBLoRA
from jlora.methods.vera import VeRA as VeRA
from jlora.methods.xgblora import XGBLoRA as XGBLoRA

# The classes alone: `from jlora.methods import *` must not bring their modules.
__all__ = [name for name, value in globals().items() if isinstance(value, type)]  # pyright: ignore[reportUnsupportedDunderAll]
