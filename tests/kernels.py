"""How XLA makes kernels where a test asks for more than the suite's quickest way gives (conftest.py)."""

from importlib.metadata import version

#: Of releases that have two ways; the quicker one rounds what it fuses otherwise.
QUICK = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
#: `compiler_options` of a program that users would get: two of them with one formula have the same bits.
USUAL = {"xla_cpu_use_fusion_emitters": True} if QUICK else {}
