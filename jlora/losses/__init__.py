"""Losses: of large vocabularies, preferences and few-step diffusion, and terms that a user adds to any loss of the task."""

from jlora.losses.adapters import orthogonality as orthogonality
from jlora.losses.chunked import TokenSums as TokenSums
from jlora.losses.chunked import chunked_cross_entropy as chunked_cross_entropy
from jlora.losses.diffusion import DiffusionSchedule as DiffusionSchedule
from jlora.losses.gates import gate_cross_entropy as gate_cross_entropy
from jlora.losses.gates import load_balance as load_balance
from jlora.losses.latent_consistency import consistency_distillation as consistency_distillation
from jlora.losses.latent_consistency import lcm_sample as lcm_sample
from jlora.losses.outputs import agreement as agreement
from jlora.losses.outputs import consistency as consistency
from jlora.losses.outputs import diversity as diversity
from jlora.losses.outputs import spectrum as spectrum
from jlora.losses.preferences import dpo as dpo
from jlora.losses.preferences import ipo as ipo
from jlora.losses.preferences import kto as kto
from jlora.losses.preferences import log_probabilities as log_probabilities
