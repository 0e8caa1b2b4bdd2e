"""The ISA paths of the native kernels: which ones this machine can run, and which one it takes."""

from __future__ import annotations

from crosspool.config.errors import ConfigError
from crosspool.kernels import native
from crosspool.kernels.native_structs import FLOAT32

ISAS = ("portable", "avx2", "avx512", "amx", "neon", "neon_bf16")
"""Names of the ISA paths in the order of ``crosspool::Isa``, of each kind of processor the slowest
first."""


def default_isa() -> str:
    """The ISA path of this process: CROSSPOOL_CPU_ISA, or else the best that the machine has.

    Raises ConfigError when CROSSPOOL_CPU_ISA names a path that the machine or the build lacks."""
    index = native.library().crosspool_isa()
    if index < 0:
        raise ConfigError(
            f"CROSSPOOL_CPU_ISA must be one of {', '.join(available_isas())} on this machine"
        )
    return ISAS[index]


def available_isas() -> list[str]:
    """The ISA paths that this machine can run, slowest first."""
    table_of = native.library().crosspool_kernels
    return [isa for index, isa in enumerate(ISAS) if table_of(index, FLOAT32)]
