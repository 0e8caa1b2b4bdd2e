"""The C modules with which Triton loads and launches kernels: one in all, and up to Triton 3.6 one
for every signature. Triton compiles them, which needs a C compiler and Python's headers; made
ahead, they need neither where they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import platform_key

from crosspool.config.errors import ConfigError
from crosspool.kernels.triton_cache.launches import Launch, entry_of

_ASK = """
import sys, sysconfig
scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
print(f"cp{sys.version_info.major}{sys.version_info.minor}")
print(sysconfig.get_paths(scheme)["include"])
print(sysconfig.get_config_var("EXT_SUFFIX"))
"""
_TIMEOUT = 120.0


@dataclass(frozen=True)
class Python:
    """A Python for which modules are compiled."""

    tag: str
    include: str
    """Folder of Python's C headers."""
    suffix: str
    """End of the names of its modules."""

    @classmethod
    def of(cls, executable: str = sys.executable) -> Python:
        """Raises ConfigError where that is no Python."""
        try:
            said = subprocess.run(
                [executable, "-c", _ASK],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"{executable} does not run as a Python: {error}") from None
        return cls(*said.split("\n")[:3])

    def check_headers(self) -> None:
        """Raises ConfigError where its headers are missing."""
        if not (Path(self.include) / "Python.h").is_file():
            raise ConfigError(
                f"{self.include} has no Python.h, which Triton needs to launch kernels: install "
                "the headers of that Python (Debian and Ubuntu: python3-dev)"
            )


@dataclass(frozen=True)
class HostModule:
    """A C module that Triton would compile where kernels are launched. Processes can pass it to
    each other."""

    kernel: str
    """Name of the module."""
    source: str
    python: Python

    @cached_property
    def entry(self) -> str:
        """Name of the module's folder in Triton's cache."""
        return entry_of(self.source + platform_key())

    def make(self, folder: Path) -> list[Path]:
        """Compiles the module into ``folder``. Returns its file.

        Raises ConfigError where the compiler or Python's headers are missing."""
        compiler = _compiler()
        self.python.check_headers()
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            code, made = Path(scratch) / "module.c", Path(scratch) / "module.so"
            code.write_text(self.source)
            driver_library = Path(scratch) / "libcuda.so.1"
            _run([compiler, "-shared", "-x", "c", os.devnull, "-o", str(driver_library)])
            _run(
                [
                    *[compiler, str(code), "-O3", "-shared", "-fPIC", "-Wno-psabi"],
                    *["-o", str(made), "-Wl,--no-as-needed", f"-L{scratch}", "-l:libcuda.so.1"],
                    *[f"-I{folder}" for folder in (*driver.include_dirs, self.python.include)],
                ]
            )
            folder.mkdir(exist_ok=True)
            return [made.replace(folder / f"{self.kernel}{self.python.suffix}")]


def host_modules(launches: Iterable[Launch], python: Python) -> list[HostModule]:
    """Returns the modules that the launches need, each once."""
    utilities = (Path(driver.dirname) / "driver.c").read_text()
    made = {utilities: HostModule("cuda_utils", utilities, python)}
    if not hasattr(driver, "make_launcher"):  # from Triton 3.7 on, one module launches everything
        return list(made.values())
    for launch in launches:
        source = driver.make_launcher(dict(launch.constants), dict(launch.signature), None)
        made.setdefault(source, HostModule("__triton_launcher", source, python))
    return list(made.values())


def _compiler() -> str:
    """Returns the C compiler that Triton would take."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise ConfigError(
            "there is no C compiler, which Triton needs to launch kernels: install gcc"
        )
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
