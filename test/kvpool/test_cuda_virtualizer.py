"""The GPU's virtualizer on the fake driver: its calls and their order, and its errors."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys

import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.kernels.cuda_driver import CudaBindings, CudaError, allow_access
from crosspool.kvpool import cuda_virtualizer
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from support.fake_cuda_memory import OUT_OF_MEMORY, FakeCuda

UNIT = 2 << 20
CHUNK = 2 * UNIT


@pytest.fixture
def driver():
    return FakeCuda(total=16 * CHUNK, granularity=UNIT)


def calls(driver: FakeCuda, *names: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, arguments) for name, arguments in driver.calls if name in names]


def test_all_memory_is_created_ahead(driver):
    seen = []
    with CudaVirtualizer(
        driver, 6 * CHUNK + 5, CHUNK, {0: CHUNK, 1: 3 * CHUNK - 1}, seen.append
    ) as pool:
        assert driver.used == pool.budget_bytes == pool.free_bytes == 6 * CHUNK
        assert seen == [CHUNK] * 6
        driver.calls.clear()
        pool.map(1, [0, 2])
        pool.unmap(1, [0])
        pool.map(0, [0])
        assert calls(driver, "create", "release", "reserve") == []
    assert driver.is_clean


def test_access_is_set_once_for_each_run_of_neighbours(driver):
    with CudaVirtualizer(driver, 16 * CHUNK, CHUNK, {0: 16 * CHUNK}) as pool:
        base = pool.tensor(0, (1,), torch.uint8).data_ptr()
        driver.calls.clear()
        pool.map(0, [7, 2, 3, 1, 9, 8, 12])
        assert calls(driver, "set_access") == [
            ("set_access", (base + 1 * CHUNK, 3 * CHUNK)),
            ("set_access", (base + 7 * CHUNK, 3 * CHUNK)),
            ("set_access", (base + 12 * CHUNK, CHUNK)),
        ]
        assert {arguments[1] for _, arguments in calls(driver, "map")} == {CHUNK}


def test_what_may_wait_for_kernels_happens_while_the_loop_is_stopped(driver):
    stopped: list[list[str]] = []

    @contextlib.contextmanager
    def quiesced():
        before = len(driver.calls)
        yield
        stopped.append([name for name, _ in driver.calls[before:]])

    pool = CudaVirtualizer(driver, 4 * CHUNK, CHUNK, {0: 4 * CHUNK})
    pool.quiesced = quiesced
    driver.calls.clear()
    pool.map(0, [1, 2])
    pool.unmap(0, [2])
    pool.map(0, [])
    pool.unmap(0, [])
    assert stopped == [["map", "map", "set_access"], ["unmap"]]
    pool.close()
    assert sum(map(len, stopped)) == len([name for name, _ in driver.calls if name != "memory"])
    assert driver.is_clean


def test_access_is_asked_for_again_while_work_is_queued(driver):
    with CudaVirtualizer(driver, 4 * CHUNK, CHUNK, {0: 4 * CHUNK}) as pool:
        kv = pool.tensor(0, (4, CHUNK), torch.uint8)
        driver.calls.clear()
        driver.not_ready = 3
        pool.map(0, [2, 0])
        assert len(calls(driver, "set_access")) == 2 + 3
        assert pool.mapped_bytes(0) == driver.accessible_bytes == 2 * CHUNK
        kv[2] = 1


def test_work_that_never_ends_is_an_error_and_nothing_is_mapped(driver, monkeypatch):
    soon = functools.partial(allow_access, patience_s=0.05)
    monkeypatch.setattr(cuda_virtualizer, "allow_access", soon)
    with CudaVirtualizer(driver, 4 * CHUNK, CHUNK, {0: 4 * CHUNK}) as pool:
        driver.not_ready = 10**6
        said = r"set_access: CUDA_ERROR_NOT_READY \(for 0.05 s: the work queued on cuda:0 does not"
        with pytest.raises(CudaError, match=said):
            pool.map(0, [0, 1])
        assert 5 < 10**6 - driver.not_ready < 50
        assert (pool.mapped_bytes(0), driver.mappings) == (0, {})
        driver.not_ready = 0
        pool.map(0, [0, 1])


@pytest.mark.parametrize(
    ("budget", "chunk", "message"),
    [
        (CHUNK, UNIT + 4096, f"chunk_bytes: {UNIT + 4096} is no multiple of {UNIT}"),
        (CHUNK, 0, "chunk_bytes: 0 "),
        (CHUNK - 1, CHUNK, f"kv_pool_bytes: {CHUNK - 1} bytes .* less than one chunk"),
        (17 * CHUNK, CHUNK, f"kv_pool_bytes: {17 * CHUNK} .* the {16 * CHUNK} bytes that cuda:0"),
    ],
)
def test_bad_sizes_name_the_field_and_leave_nothing(driver, budget, chunk, message):
    with pytest.raises(ConfigError, match=message):
        CudaVirtualizer(driver, budget, chunk, {0: CHUNK})
    assert driver.is_clean


def test_memory_that_ends_while_it_is_taken_names_the_field(driver):
    driver.fail["create"] = 3, OUT_OF_MEMORY
    with pytest.raises(ConfigError, match=r"kv_pool_bytes: .* that cuda:0 has free"):
        CudaVirtualizer(driver, 8 * CHUNK, CHUNK, {0: CHUNK})
    assert driver.is_clean


@pytest.mark.parametrize("call", ["reserve", "create"])
def test_another_failure_at_the_start_leaves_nothing(driver, call):
    driver.fail[call] = 1, "CUDA_ERROR_UNKNOWN"
    with pytest.raises(CudaError, match=f"{call}: CUDA_ERROR_UNKNOWN"):
        CudaVirtualizer(driver, 8 * CHUNK, CHUNK, {0: CHUNK, 1: CHUNK})
    assert driver.is_clean


def test_closing_goes_on_where_it_failed(driver):
    pool = CudaVirtualizer(driver, 4 * CHUNK, CHUNK, {0: 4 * CHUNK, 1: CHUNK})
    pool.map(0, [1, 3])
    for call, after in (("unmap", 1), ("release", 2), ("free_reservation", 1)):
        driver.fail[call] = after, "CUDA_ERROR_UNKNOWN"
        with pytest.raises(CudaError, match=call):
            pool.close()
    pool.close()
    assert driver.is_clean


TOUCH = """
import sys, torch
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from support.fake_cuda_memory import FakeCuda
pool = CudaVirtualizer(FakeCuda(total=8 << 20), 8 << 20, 2 << 20, {0: 8 << 20})
kv = pool.tensor(0, (4, 1 << 20), torch.bfloat16)
pool.map(0, [1, 2])
kv[1:3] = 1
pool.unmap(0, [2])
kv[1] = 2
print("mapped is fine", flush=True)
kv[int(sys.argv[1]), -1].item()
print("touched", flush=True)
"""


@pytest.mark.parametrize("chunk", [0, 2], ids=["never mapped", "unmapped"])
def test_touching_what_is_not_mapped_is_a_fault(chunk):
    done = subprocess.run(
        [sys.executable, "-c", TOUCH, str(chunk)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert done.stdout == b"mapped is fine\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_a_missing_gpu_is_a_clear_error():
    index = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"device cuda:{index}"):
        CudaBindings(index)
