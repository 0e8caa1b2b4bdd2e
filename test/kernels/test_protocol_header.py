"""The protocol headers compile for devices too; their behaviour is tested on the host."""

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_for_a_device(architecture, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    subprocess.run(
        [
            nvcc,
            "-std=c++20",
            "--Werror=all-warnings",
            f"-arch={architecture}",
            f"-I{NATIVE / 'include'}",
            "-c",
            NATIVE / "test/protocol.cu",
            "-o",
            tmp_path / "protocol.o",
        ],
        check=True,
        timeout=240,
    )
