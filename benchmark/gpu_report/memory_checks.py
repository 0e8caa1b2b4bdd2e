"""Checks of the KV pool's virtual memory: captures while nothing is mapped, mapping beside a
resident loop, what it costs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from crosspool.kernels.cuda_loop import CudaLoop
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.ranks.gpu.lanes import make_stages

from benchmark.gpu_lanes import Lanes, Row
from benchmark.gpu_report.bundled import PAGES, Reference, kv_shape, load, prompts, spec_of
from benchmark.gpu_report.loop_checks import resident
from benchmark.gpu_report.notes import Gravity, Notes
from benchmark.gpu_report.platform import Platform
from benchmark.gpu_report.watchdog import beside
from benchmark.gpu_vmm import kernel, measure_calls, measure_pool, nothing
from benchmark.records import Recorder

_OTHER_CHUNKS = 8
"""Chunks of a range that no kernel uses."""


@contextlib.contextmanager
def _pool(platform: Platform, name: str) -> Iterator[tuple[CudaVirtualizer, torch.Tensor, int]]:
    """A pool with a range for a model's KV and one for nobody; gives its KV, of which nothing is
    mapped, and the chunks of it."""
    driver, shape = platform.driver(), kv_shape(spec_of(platform, name))
    chunk = driver.granularity
    own = -(-math.prod(shape) * torch.float32.itemsize // chunk)
    ranges = {0: own * chunk, 1: _OTHER_CHUNKS * chunk}
    with CudaVirtualizer(driver, sum(ranges.values()), chunk, ranges) as pool:
        yield pool, pool.tensor(0, shape, torch.float32), own


def unmapped_kv(platform: Platform, notes: Notes) -> None:
    """The server captures, with a warm-up of every stage, before any KV is mapped."""
    for name in platform.scale.models:
        with _pool(platform, name) as (pool, kv, chunks):
            model, buckets = load(platform, name, kv), platform.scale.buckets
            places, stages = make_stages([model], buckets, 1, buckets[-1], platform.device)
            notes.at("captures every stage while no KV is mapped", model=name)
            _, refused = platform.capture(places, stages)
            for (_, _, stage, bucket), reason in refused.items():
                where = {"model": name, "stage": stage.name, "bucket": buckets[bucket]}
                notes.finding(Gravity.REFUSED, f"while no KV is mapped: {reason}", **where)
            if refused:
                continue
            notes.at("maps the KV and fills it", model=name)
            pool.map(0, range(chunks))
            kv.fill_(torch.nan)
            platform.synchronize()
            pool.unmap(0, range(chunks))
            notes.fact("captured while no KV was mapped", True, model=name)


def mapping_beside_the_loop(platform: Platform, notes: Notes) -> None:
    """Maps and unmaps memory that no kernel uses, while a lane works: with the loop on the device,
    and with the loop off it for each call."""
    scale, name = platform.scale, platform.scale.models[0]
    prompt = prompts(1, scale.prompt_tokens)[0]
    expected = Reference(platform, name).greedy(prompt, scale.new_tokens)
    with _pool(platform, name) as (pool, kv, chunks):
        pool.map(0, range(chunks))
        kv.fill_(torch.nan)
        platform.synchronize()
        with resident(platform, notes, kv=kv) as lanes:
            loop = lanes.loop
            assert isinstance(loop, CudaLoop)
            lanes.push(0, 0, [Row(prompt, 0, range(PAGES))])
            lanes.pop()
            for leaves in (False, True):
                pool.quiesced = loop.quiesced if leaves else contextlib.nullcontext
                _while_it_works(
                    notes, lanes, pool, start=len(prompt), expected=expected, leaves=leaves
                )
            pool.quiesced = contextlib.nullcontext


def _while_it_works(
    notes: Notes,
    lanes: Lanes,
    pool: CudaVirtualizer,
    *,
    start: int,
    expected: list[int],
    leaves: bool,
) -> None:
    """Maps and unmaps in a lease; its tokens must be right. ``start``: tokens of the prompt, whose
    step has chosen the first of ``expected``."""
    words = "the loop leaves for each" if leaves else "the loop stays"
    rest = len(expected) - 1
    lanes.push(0, 0, [Row(expected[:1], start, range(PAGES))], lease=rest)
    loop = lanes.loop
    assert isinstance(loop, CudaLoop)
    chunks = range(_OTHER_CHUNKS)
    good = True
    calls: tuple[tuple[str, Callable[[], None]], ...] = (
        ("map", lambda: pool.map(1, chunks)),
        ("unmap", lambda: pool.unmap(1, chunks)),
    )
    for what, call in calls:
        good = good and beside(notes, loop, f"{what} of {len(chunks)} chunks, {words},", call)
    more = lanes.pop()[1]
    found = expected[:1] + more[:, 0].tolist()
    if found != expected:
        notes.finding(
            Gravity.WRONG, f"tokens {found} while memory is mapped and {words}, not {expected}"
        )
    notes.fact(f"memory comes and goes, {words}", "right" if found == expected else "wrong")


def mapping_costs(platform: Platform, notes: Notes) -> None:
    """Microseconds of each call, alone and while a kernel runs, and of the pool for each chunk."""
    scale, driver = platform.scale, platform.driver()
    recorder = Recorder("gpu_vmm", notes.measured)
    gpu, chunks = platform.name, scale.chunks
    for mib in scale.chunk_mib:
        size = mib << 20
        notes.at(f"measures chunks of {mib} MiB")
        measure_pool(driver, recorder, gpu=gpu, chunk_bytes=size, chunks=chunks)
        measure_calls(
            driver,
            recorder,
            gpu=gpu,
            chunk_bytes=size,
            chunks=chunks,
            beside="alone",
            running=nothing,
        )
    if platform.is_gpu:
        notes.at("measures calls while a kernel runs")
        measure_calls(
            driver,
            recorder,
            gpu=gpu,
            chunk_bytes=scale.chunk_mib[0] << 20,
            chunks=8,
            beside="kernel",
            running=kernel,
        )
    for row in recorder.rows:
        if row["name"] == "pool map" and row["parameters"]["pattern"] == "single":
            mib = row["parameters"]["chunk_bytes"] >> 20
            notes.headline(f"map a chunk of {mib} MiB", row["median"], "us")
        if row.get("waited"):
            notes.finding(
                Gravity.WAITS, f"{row['name']} waits for a running kernel ({row['waited']:.0%})"
            )
