"""jlora: parameter-efficient fine-tuning for JAX and Flax, done as functions."""

from jlora.adapted import Adapted as Adapted
from jlora.adapted import adapterize as adapterize
from jlora.adapted import merge as merge
from jlora.adapted import summary as summary
from jlora.allocate.history import RankHistory as RankHistory
from jlora.allocate.transform import rank_history as rank_history
from jlora.allocate.transform import ranks as ranks
from jlora.files import load as load
from jlora.files import save as save
from jlora.fingerprint import fingerprint as fingerprint
from jlora.interchange import PeftReport as PeftReport
from jlora.interchange import TorchParameter as TorchParameter
from jlora.interchange import load_peft as load_peft
from jlora.interchange import save_peft as save_peft
from jlora.lift import lift as lift
from jlora.method import Factors as Factors
from jlora.method import Method as Method
from jlora.method import OptimizerRule as OptimizerRule
from jlora.method import Site as Site
from jlora.method import Start as Start
from jlora.method import View as View
from jlora.methods import *  # noqa: F403
from jlora.optimizer import optimizer as optimizer
from jlora.optimizer import with_rules as with_rules
from jlora.prepare import Prepared as Prepared
from jlora.prepare import prepare as prepare
from jlora.serialize import method_from_dict as method_from_dict
from jlora.serialize import method_to_dict as method_to_dict
from jlora.sites import Sites as Sites
from jlora.sites import sites as sites
from jlora.spec import ALL_LINEAR as ALL_LINEAR
from jlora.spec import Axes as Axes
