"""Accelerators by name: their memory, and their compilers, which need no such chip."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax

from jlora.training.errors import SettingError

#: Facts of an H100 SXM from which XLA's GPU compiler works.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85045346304 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_GPUS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
        name: as `--device` has it.
        memory: bytes of a chip.
        dimensions: of the torus in which chips of a slice are joined; 0 for GPUs.
        most: chips of the largest slice; 0 for GPUs.
        packages: what to install to compile for it.
        options: of the compiler, where the chip is not there.
    """

    name: str
    memory: float
    dimensions: int
    most: int
    packages: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def shape(self, chips: int) -> tuple[int, ...]:
        """The shape of a slice of that many chips: as even as powers of two are.

        Raises:
            SettingError: if there is no such slice.
        """
        power = chips.bit_length() - 1
        if chips != 2**power or chips > self.most:
            raise SettingError(
                "mesh", f"is of {chips} chips a slice, but slices of {self.name} have 1, 2, 4, 8, … up to {self.most:,}"
            )
        each = [2 ** ((power + place) // self.dimensions) for place in range(self.dimensions)]
        return tuple(each) if power > 2 else tuple(reversed(each)) if self.dimensions == 3 else tuple(each)


#: Memory as it is published; a chip's runtime keeps some of it for itself.
CHIPS = {
    "v5e": Chip("v5e", 16e9, 2, 256, 'pip install -U "jax[tpu]"'),
    "v5p": Chip("v5p", 95e9, 3, 4096, 'pip install -U "jax[tpu]"'),
    # Fused kernels are chosen without a trial.
    "h100": Chip("h100", 80e9, 0, 0, "pip install jax-cuda13-plugin jax-cuda13-pjrt", {"xla_gpu_autotune_level": 0}),
}


class NoCompilerError(RuntimeError):
    """The compiler for a chip is not installed; the message says how it is."""


def stay_off_chips() -> None:
    """Keeps JAX on the CPU, whatever this machine has; to be called before anything else of JAX."""
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine to ask for its place in a pod
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a compiler alone may run twice at a time
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # CUDA's own libraries are not needed to compile


def described(chip: Chip, chips: int, slices: int) -> list[Any]:
    """Devices of a kind that need not be there, for programs that are only compiled.

    Raises:
        NoCompilerError: where the compiler is not installed.
        SettingError: if no slices have that many chips.
    """
    from jax.experimental import topologies

    if slices > 1 and not chip.dimensions:
        raise SettingError("slices", f"are of TPUs; {chip.name} has none")
    if chip.dimensions:
        shape = "x".join(map(str, chip.shape(chips // slices)))
        wanted: dict[str, Any] = {"platform": "tpu", "topology_name": f"{chip.name}:{shape}"}
        wanted |= {"num_slices": slices} if slices > 1 else {}
    else:
        within = min(chips, _GPUS_OF_A_HOST)
        if chips % within:
            raise SettingError("mesh", f"is of {chips} GPUs, but those of several hosts come in eights")
        layout = f"1x{math.ceil(chips / within)}x{within}"
        wanted = {"platform": "cuda", "topology_name": chip.name, "target_config": H100, "topology": layout}
    try:
        return list(topologies.get_topology_desc(**wanted).devices)
    except Exception as error:  # of many kinds, by what is missing
        reason = " ".join(str(error).split())[:120]
        raise NoCompilerError(
            f"no compiler for {chip.name} is found here ({type(error).__name__}: {reason}); {chip.packages}, of the versions "
            f"that JAX {jax.__version__} asks for, and the step is compiled too, without such a chip"
        ) from error
