"""The GPU's resident loop over a driver that runs on the host and enforces CUDA's documented limits
(sgl-kernel-ext/test/fake_driver.h): built here with the C++ compiler alone."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crosspool.kernels import cuda_loop

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"
COMPILER = shutil.which("c++") or shutil.which("g++")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
HOST_SIDE = (
    "cuda/description.cpp",
    "cuda/graph_table.cpp",
    "cuda/resident.cpp",
    "cuda/resident_trace.cpp",
    "test/fake_calls.cpp",
    "test/fake_driver.cpp",
)

_BODY = ctypes.CFUNCTYPE(None)


class Knob(enum.IntEnum):
    """crosspool::fake::Knob."""

    DROP_UPLOAD = 0
    DROP_DEVICE_LAUNCH = 1
    RELAUNCH_TWICE = 2
    FLOOD_TAILS = 3


class Node(enum.IntEnum):
    """cudaGraphNodeType."""

    KERNEL = 0
    HOST = 3
    CHILD_GRAPH = 4
    EMPTY = 5
    ALLOCATION = 10


INVALID_VALUE = 1
"""cudaErrorInvalidValue."""


def compile_sources(sources: Sequence[str | Path], into: Path, flags: Sequence[str]) -> list[Path]:
    """Objects of C++ sources (relative to sgl-kernel-ext), two at a time."""

    def build(source: str | Path) -> Path:
        target = into / (Path(source).stem + ".o")
        command: list[str | Path] = [
            str(COMPILER),
            "-std=c++20",
            *WARNINGS,
            *flags,
            "-I",
            NATIVE / "include",
        ]
        subprocess.run([*command, "-c", NATIVE / source, "-o", target], check=True, timeout=120)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, sources))


def build(into: Path) -> Path:
    """The library: the host's side of the loop, its C face, and the fake driver. Each copy has a
    driver of its own when it is loaded."""
    library = into / "libcrosspool_cuda_fake.so"
    library.write_bytes(_built())
    return library


@functools.cache
def _built() -> bytes:
    """The library's file, which this process compiles once."""
    sources = (*HOST_SIDE, "cuda/c_face.cpp", "cpu/version.cpp", "test/fake_face.cpp")
    with tempfile.TemporaryDirectory(prefix="crosspool-test-") as name:
        objects = compile_sources(sources, Path(name), ("-O1", "-fPIC"))
        library = Path(name) / "library.so"
        subprocess.run([str(COMPILER), "-shared", *objects, "-o", library], check=True, timeout=120)
        return library.read_bytes()


class FakeCuda:
    """The library, and the driver behind it. Graphs live until :meth:`close`."""

    def __init__(self, path: Path) -> None:
        self.native = cuda_loop.load(path)
        self.native.crosspool_fake_graph.restype = ctypes.c_void_p
        self.native.crosspool_fake_stream.restype = ctypes.c_void_p
        self.native.crosspool_fake_violation.restype = ctypes.c_char_p
        self._bodies: list[object] = []
        self._graphs: list[int] = []

    def graph(
        self,
        body: Callable[[], None] = lambda: None,
        *,
        ticks: int = 1,
        nodes: Sequence[tuple[Node, int | None]] = (),
        empty: bool = False,
    ) -> int:
        """A captured graph whose kernel runs ``body`` in ``ticks`` units of progress, with further
        nodes; ``empty``: with these alone."""
        function = _BODY(body)
        self._bodies.append(function)
        graph = self.native.crosspool_fake_graph(function, ticks)
        if empty:
            self.native.crosspool_fake_remove_nodes(ctypes.c_void_p(graph))
        for kind, child in nodes:
            self.native.crosspool_fake_add_node(
                ctypes.c_void_p(graph), int(kind), ctypes.c_void_p(child)
            )
        self._graphs.append(graph)
        return int(graph)

    def connections(self, count: int) -> None:
        """Has streams dealt to ``count`` connections, from the next stream on."""
        self.native.crosspool_fake_connections(count)

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        """A stream of the host's own."""
        stream = int(self.native.crosspool_fake_stream())
        try:
            yield stream
        finally:
            self.native.crosspool_fake_destroy_stream(ctypes.c_void_p(stream))

    def run(self, units: int) -> None:
        self.native.crosspool_fake_run(units)

    def turn(self, knob: Knob) -> None:
        self.native.crosspool_fake_turn(int(knob))

    def fail_call(self, name: str, successes: int, error: int = INVALID_VALUE) -> None:
        self.native.crosspool_fake_fail_call(name.encode(), successes, error)

    def fail_tail_launch(self, error: int) -> None:
        self.native.crosspool_fake_fail_tail_launch(error)

    def fail_relaunch(self, error: int) -> None:
        self.native.crosspool_fake_fail_relaunch(error)

    def fault_stage(self) -> None:
        self.native.crosspool_fake_fault_stage()

    @property
    def violations(self) -> list[str]:
        found: list[str] = []
        while (text := self.native.crosspool_fake_violation(len(found))) is not None:
            found.append(text.decode())
        return found

    @property
    def live(self) -> int:
        """What was made and not given back, but for captured graphs."""
        return int(self.native.crosspool_fake_live()) - len(self._graphs)

    def close(self) -> None:
        for graph in self._graphs:
            self.native.crosspool_fake_destroy_graph(ctypes.c_void_p(graph))
        self._graphs.clear()
        self.native.crosspool_fake_reset()
