"""jlora: parameter-efficient fine-tuning for JAX and Flax, done as functions."""

import importlib as _importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING

from jlora import _former
from jlora import losses as losses
from jlora import mesh as mesh
from jlora.analysis.coding import CodingError as CodingError
from jlora.analysis.coding import CodingErrors as CodingErrors
from jlora.analysis.coding import coding_errors as coding_errors
from jlora.analysis.explain import explain as explain
from jlora.analysis.intrinsic import intrinsic_dimension as intrinsic_dimension
from jlora.analysis.intrinsic import intrinsic_dimensions as intrinsic_dimensions
from jlora.analysis.intruders import Intruders as Intruders
from jlora.analysis.intruders import LeafIntruders as LeafIntruders
from jlora.analysis.intruders import intruder_dimensions as intruder_dimensions
from jlora.analysis.intruders import without_intruders as without_intruders
from jlora.analysis.objective import TaskDimension as TaskDimension
from jlora.analysis.objective import intrinsic_dimension_90 as intrinsic_dimension_90
from jlora.analysis.pictures import intruder_plot as intruder_plot
from jlora.compose.average import average as average
from jlora.compose.bank import Bank as Bank
from jlora.compose.combine import combine as combine
from jlora.compose.lorahub import LoraHub as LoraHub
from jlora.compose.lorahub import lorahub as lorahub
from jlora.compose.mera import mera as mera
from jlora.compose.mixtures.meteora import meteora as meteora
from jlora.compose.mixtures.milora import MiLoRA as MiLoRA
from jlora.compose.mixtures.prompt_routed import prompt_routed as prompt_routed
from jlora.compose.mixtures.two_passes import two_passes as two_passes
from jlora.compose.mixtures.xlora import xlora as xlora
from jlora.compose.plain import compact as compact
from jlora.compose.switch import Pack as Pack
from jlora.compose.switch import fuse as fuse
from jlora.compose.switch import interference as interference
from jlora.compose.switch import pack as pack
from jlora.compose.switch import restore as restore
from jlora.compose.switch import switch as switch
from jlora.compose.ziplora import Zipped as Zipped
from jlora.compose.ziplora import zip_adapters as zip_adapters
from jlora.continual.next_task import next_task as next_task
from jlora.continual.online import OnlineLoRA as OnlineLoRA
from jlora.continual.online import OnlineState as OnlineState
from jlora.continual.online import own_label_losses as own_label_losses
from jlora.continual.plateau import Plateau as Plateau
from jlora.continual.plateau import PlateauState as PlateauState
from jlora.continual.scores import TaskScores as TaskScores
from jlora.core.products.low_rank import Factors as Factors
from jlora.core.products.sparse import Sparse as Sparse
from jlora.core.products.update import Update as Update
from jlora.core.protocol.code import Code as Code
from jlora.core.protocol.event import Event as Event
from jlora.core.protocol.fields import Fields as Fields
from jlora.core.protocol.gated import Gated as Gated
from jlora.core.protocol.lifelong import Lifelong as Lifelong
from jlora.core.protocol.method import Method as Method
from jlora.core.protocol.method import OptimizerRule as OptimizerRule
from jlora.core.protocol.method import Site as Site
from jlora.core.protocol.method import Start as Start
from jlora.core.protocol.method import View as View
from jlora.core.protocol.readings import Sites as Sites
from jlora.core.protocol.stored import Stored as Stored
from jlora.core.protocol.wrapping import Around as Around
from jlora.core.transforms.each_run import each_run as each_run
from jlora.core.transforms.each_run import hold as hold
from jlora.core.transforms.lift import lift as lift
from jlora.core.transforms.observe import Statistic as Statistic
from jlora.core.transforms.observe import input_covariance as input_covariance
from jlora.core.transforms.observe import input_norms as input_norms
from jlora.core.transforms.observe import input_squares as input_squares
from jlora.core.transforms.observe import observe as observe
from jlora.core.transforms.observe import watch as watch
from jlora.core.transforms.prepare import prepare as prepare
from jlora.core.transforms.sites import sites as sites
from jlora.core.tree.adapted import Adapted as Adapted
from jlora.core.tree.adapterize import adapterize as adapterize
from jlora.core.tree.merge import merge as merge
from jlora.core.tree.quantize import dequantize as dequantize
from jlora.core.tree.quantize import quantize as quantize
from jlora.core.tree.quantize import requantize as requantize
from jlora.core.tree.residuals import loftq as loftq
from jlora.core.tree.residuals import residuals as residuals
from jlora.core.tree.spec import ALL_LINEAR as ALL_LINEAR
from jlora.core.tree.spec import Axes as Axes
from jlora.core.tree.stacked import Stacked as Stacked
from jlora.core.tree.stacked import stack as stack
from jlora.core.tree.stacked import unstack as unstack
from jlora.core.tree.starts import Prepared as Prepared
from jlora.core.tree.summary import summary as summary
from jlora.disk import registered as _registered  # noqa: F401  (Flax's serialization and jax.export know Adapted)
from jlora.disk.adapters import load as load
from jlora.disk.adapters import save as save
from jlora.disk.fingerprint import fingerprint as fingerprint
from jlora.disk.serialize import method_from_dict as method_from_dict
from jlora.disk.serialize import method_to_dict as method_to_dict
from jlora.interchange import PeftReport as PeftReport
from jlora.interchange import load_peft as load_peft
from jlora.interchange import save_peft as save_peft
from jlora.methods import *  # noqa: F403
from jlora.methods.alora.rule import reallocate as reallocate
from jlora.methods.gelora import gelora_ranks as gelora_ranks
from jlora.methods.glora.search import GloraSearch as GloraSearch
from jlora.methods.glora.search import glora_configuration as glora_configuration
from jlora.methods.glora.search import glora_configured as glora_configured
from jlora.methods.glora.search import glora_evolve as glora_evolve
from jlora.methods.glora.search import glora_size as glora_size
from jlora.models.prefix_layout import PrefixLayout as PrefixLayout
from jlora.models.torch_parameter import TorchParameter as TorchParameter
from jlora.optimize.allocate.history import RankHistory as RankHistory
from jlora.optimize.allocate.reading import rank_history as rank_history
from jlora.optimize.allocate.reading import ranks as ranks
from jlora.optimize.allocate.reading import skipped_steps as skipped_steps
from jlora.optimize.events import EventContext as EventContext
from jlora.optimize.events import EventContext as Moment  # noqa: F401  (its former name)
from jlora.optimize.events import run_events as run_events
from jlora.optimize.offload import offload as offload
from jlora.optimize.optimizer import optimizer as optimizer
from jlora.optimize.optimizer import with_rules as with_rules
from jlora.optimize.restart import link_ends as link_ends
from jlora.optimize.restart import restart as restart
from jlora.optimize.restart import restart_schedule as restart_schedule
from jlora.prompts import *  # noqa: F403
from jlora.prompts.bare import without_encoder as without_encoder
from jlora.prompts.focused import Focus as Focus
from jlora.prompts.focused import focus as focus
from jlora.prompts.focused import focused as focused
from jlora.prompts.prompted import prompted as prompted
from jlora.stored.compressed import JointLowRank as JointLowRank
from jlora.stored.compressed import LowRank as LowRank
from jlora.stored.compressed import SpectralTrain as SpectralTrain
from jlora.stored.compressed import TensorTrain as TensorTrain
from jlora.stored.compressed import TransposedPair as TransposedPair
from jlora.stored.float8 import Float8 as Float8
from jlora.stored.fp4 import FP4 as FP4
from jlora.stored.int4 import Int4 as Int4
from jlora.stored.int8 import Int8 as Int8
from jlora.stored.normal_float import NF2 as NF2
from jlora.stored.normal_float import NF3 as NF3
from jlora.stored.normal_float import NF4 as NF4
from jlora.stored.qwix import from_qwix as from_qwix
from jlora.stored.uniform import Uniform as Uniform

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    name
    for name, value in globals().items()
    if not name.startswith("_") and (value is losses or value is mesh or not isinstance(value, _ModuleType))
]

if not _TYPE_CHECKING:  # to a type checker every name of jlora would exist

    def __getattr__(name: str) -> object:
        """What stands above the face or needs packages of its own, imported where it is first asked for; and former names."""
        if name in ("nnx", "linen", "serving", "training"):
            return _importlib.import_module(f"jlora.{name}")
        if name == "finetune":
            return _importlib.import_module("jlora.training").finetune
        return _former.module(name)

else:
    from jlora import linen as linen
    from jlora import nnx as nnx

    def finetune(*given, **values):
        """Fine-tune a model: `jlora.training.finetune`."""
