"""Losses: the cross-entropy of large vocabularies, and terms that a user adds to any loss of the task."""

from jlora.losses.adapters import orthogonality as orthogonality
from jlora.losses.chunked import TokenSums as TokenSums
from jlora.losses.chunked import chunked_cross_entropy as chunked_cross_entropy
from jlora.losses.outputs import agreement as agreement
from jlora.losses.outputs import consistency as consistency
from jlora.losses.outputs import diversity as diversity
from jlora.losses.outputs import spectrum as spectrum
