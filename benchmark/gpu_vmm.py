"""What the driver's calls for the KV pool of a GPU cost, by chunk size, and whether they wait for
kernels that run.

    python -m benchmark.gpu_vmm [--chunk-mib 2 8 32] [--chunks 64] [--gpu 0]

Rows ``create``, ``map``, ``set access``, ``set access, run``, ``unmap``, ``release``, ``export``
and ``import`` are microseconds per call; the parameters say the chunk's size and what else ran on
the GPU: ``alone``, or ``kernel``, a kernel that outlasts the call if the call does not wait for it
(``waited``: share of the calls that ended only after it; ``not_ready``: how often the driver said
that it was not ready to set access, which was then asked for again). ``pool map`` and ``pool
unmap`` are microseconds per chunk through the KV pool's virtualizer. The owner of a resident loop
passes what runs it to :func:`measure_calls`; a call that never returns ends the process after a
minute, with the call's traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from benchmark import machine
from benchmark.records import Recorder

if TYPE_CHECKING:
    from crosspool.kernels.cuda_driver import CudaDriver

_PATIENCE_S = 60
_RUN = 8
"""Chunks side by side that get access at once in ``set access, run``."""
_SLEEP_S = 0.1

Running = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Runs something on the GPU within; what it gives says whether it is still running."""


@contextlib.contextmanager
def nothing() -> Iterator[Callable[[], bool]]:
    yield lambda: True


@contextlib.contextmanager
def kernel() -> Iterator[Callable[[], bool]]:
    """A kernel of a tenth of a second on a stream of its own."""
    import torch

    cycles = _cycles()
    stream, ended = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)
        ended.record(stream)
    try:
        yield lambda: not ended.query()
    finally:
        ended.synchronize()


@functools.cache
def _cycles() -> int:
    """Cycles of a kernel that takes ``_SLEEP_S``."""
    import torch

    tried, begin, end = 20_000_000, torch.cuda.Event(True), torch.cuda.Event(True)
    torch.cuda._sleep(tried)
    begin.record()
    torch.cuda._sleep(tried)
    end.record()
    end.synchronize()
    return int(tried * 1000 * _SLEEP_S / begin.elapsed_time(end))


class Clock:
    """Times calls by name, and sees which of them ended only after what ran beside them."""

    def __init__(self) -> None:
        self.us: dict[str, list[float]] = {}
        self.waited: dict[str, int] = {}

    def time(
        self, name: str, call: Callable[..., int | None], *arguments: int, running: Running
    ) -> int:
        """Times a call; returns its result, or 0."""
        with running() as runs:
            faulthandler.dump_traceback_later(_PATIENCE_S, exit=True, file=2)
            try:
                began = time.perf_counter_ns()
                result = call(*arguments)
                took_ns = time.perf_counter_ns() - began
            finally:
                faulthandler.cancel_dump_traceback_later()
            self.us.setdefault(name, []).append(took_ns / 1000)
            self.waited[name] = self.waited.get(name, 0) + (not runs())
        return result or 0


def measure_calls(
    driver: CudaDriver,
    recorder: Recorder,
    *,
    gpu: str,
    chunk_bytes: int,
    chunks: int,
    beside: str,
    running: Running,
) -> None:
    """Every call for each of ``chunks`` chunks, with ``running`` (called ``beside``) around it.
    ``chunks``: a multiple of 8."""
    from crosspool.kernels.cuda_driver import allow_access

    clock, nbytes = Clock(), chunk_bytes
    not_ready = {"set access": 0, "set access, run": 0}
    load1, began, busy = machine.load1(), time.monotonic(), time.process_time()

    def timed(name: str, call: Callable[..., int | None], *arguments: int) -> int:
        return clock.time(name, call, *arguments, running=running)

    allow = functools.partial(allow_access, driver)
    base = timed("reserve", driver.reserve, chunks * nbytes)
    places = [base + chunk * nbytes for chunk in range(chunks)]
    handles = [timed("create", driver.create, nbytes) for _ in places]
    for name, step in (("set access", 1), ("set access, run", _RUN)):
        for place, handle in zip(places, handles, strict=True):
            timed("map", driver.map, place, nbytes, handle)
        for place in places[::step]:
            not_ready[name] += timed(name, allow, place, step * nbytes)
        for place in places:
            timed("unmap", driver.unmap, place, nbytes)
    for handle in handles[:_RUN]:
        descriptor = timed("export", driver.export, handle)
        imported = timed("import", driver.import_descriptor, descriptor)
        os.close(descriptor)
        driver.release(imported)
    for handle in handles:
        timed("release", driver.release, handle)
    timed("free reservation", driver.free_reservation, base, chunks * nbytes)
    for name, values in clock.us.items():
        recorder.add(
            name,
            values,
            "us",
            parameters={"chunk_bytes": chunk_bytes, "beside": beside},
            waited=clock.waited[name] / len(values),
            not_ready=not_ready.get(name, 0),
            gpu=gpu,
            cpu_s=time.process_time() - busy,
            wall_s=time.monotonic() - began,
            load1=load1,
        )


def measure_pool(
    driver: CudaDriver, recorder: Recorder, *, gpu: str, chunk_bytes: int, chunks: int
) -> None:
    """Maps and unmaps through the virtualizer, neighbours and single chunks."""
    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer

    for pattern, step in (("neighbours", 1), ("single", 2)):
        load1, began, busy = machine.load1(), time.monotonic(), time.process_time()
        us: dict[str, list[float]] = {"pool map": [], "pool unmap": []}
        with CudaVirtualizer(
            driver, chunks * chunk_bytes, chunk_bytes, {0: 2 * chunks * chunk_bytes}
        ) as pool:
            for first in range(0, 2 * chunks, _RUN * step):
                taken = list(range(first, first + _RUN * step, step))
                for name, call in (("pool map", pool.map), ("pool unmap", pool.unmap)):
                    start = time.perf_counter_ns()
                    call(0, taken)
                    us[name].append((time.perf_counter_ns() - start) / 1000 / len(taken))
        for name, values in us.items():
            recorder.add(
                name,
                values,
                "us",
                parameters={"chunk_bytes": chunk_bytes, "beside": "alone", "pattern": pattern},
                gpu=gpu,
                cpu_s=time.process_time() - busy,
                wall_s=time.monotonic() - began,
                load1=load1,
            )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu_vmm", description=__doc__)
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--chunks", type=int, default=64, help="of each size; a multiple of 8")
    parser.add_argument("--gpu", type=int, default=0)
    given = parser.parse_args(words)
    if given.chunks < _RUN or given.chunks % _RUN:
        parser.error(f"--chunks: {given.chunks} is no multiple of {_RUN}")
    import torch

    if not torch.cuda.is_available():
        print("benchmark.gpu_vmm: there is no GPU here", file=sys.stderr)
        return 1
    from crosspool.kernels.cuda_driver import CudaBindings

    torch.cuda.set_device(given.gpu)
    torch.cuda.init()
    driver, gpu = CudaBindings(given.gpu), torch.cuda.get_device_name(given.gpu)
    recorder = Recorder("gpu_vmm")
    for mib in given.chunk_mib:
        size = mib << 20
        measure_pool(driver, recorder, gpu=gpu, chunk_bytes=size, chunks=given.chunks)
        measure_calls(
            driver,
            recorder,
            gpu=gpu,
            chunk_bytes=size,
            chunks=given.chunks,
            beside="alone",
            running=nothing,
        )
    measure_calls(
        driver,
        recorder,
        gpu=gpu,
        chunk_bytes=given.chunk_mib[0] << 20,
        chunks=_RUN,
        beside="kernel",
        running=kernel,
    )
    recorder.write()
    _print(recorder)
    return 0


def _print(recorder: Recorder) -> None:
    print(f"{'call':26}{'beside':8}{'MiB':>5}{'median us':>12}{'p99 us':>12}{'waited':>8}")
    for row in recorder.rows:
        given = row["parameters"]
        what = " ".join([row["name"], given.get("pattern", "")]).strip()
        print(
            f"{what:26}{given['beside']:8}{given['chunk_bytes'] >> 20:>5}{row['median']:>12.4g}"
            f"{row['p99']:>12.4g}{row.get('waited', ''):>8}"
        )


if __name__ == "__main__":
    sys.exit(main())
