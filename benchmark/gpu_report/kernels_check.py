"""Compiles the kernels of a part ahead, in many processes, so that no other check spends its time
limit on it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmark.gpu_report.notes import Notes
from benchmark.gpu_report.platform import Platform


def compile_kernels(platform: Platform, notes: Notes, what: str) -> None:
    """``what``: ``bundled`` models, or the ``shape`` whose times are taken."""
    from crosspool.kernels.triton_cache.host_modules import Python
    from crosspool.kernels.triton_cache.toolchain import Toolchain
    from crosspool.ranks.gpu.compile import compile_ahead

    from benchmark.gpu_report.launches import report_launches

    scale = platform.scale
    models = [scale.shape] if what == "shape" else list(scale.models)
    major, minor = torch.cuda.get_device_capability(platform.device)
    notes.at("lists the kernels")
    launches = report_launches(scale, 10 * major + minor, models)
    notes.at("compiles the kernels that are not there")
    made = compile_ahead(
        launches,
        Path(os.environ["TRITON_CACHE_DIR"]),
        toolchain=Toolchain.own(),
        python=Python.of(),
    )
    for problem in made.wrong:
        notes.fact("wrong with the folder of compiled kernels, mended", problem)
    notes.fact("kernels", made.compiled + made.found, compiled=made.compiled, found=made.found)
