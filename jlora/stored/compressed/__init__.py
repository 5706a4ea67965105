"""Codes that keep a matrix as a product of smaller arrays, and not as numbers of few bits; a file each."""

from jlora.stored.compressed.joint_low_rank import JointLowRank as JointLowRank
from jlora.stored.compressed.low_rank import LowRank as LowRank
from jlora.stored.compressed.spectral_train import SpectralTrain as SpectralTrain
from jlora.stored.compressed.tensor_train import TensorTrain as TensorTrain
from jlora.stored.compressed.transposed_pair import TransposedPair as TransposedPair
