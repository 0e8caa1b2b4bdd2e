"""The mremap virtualizer with real memory: mapped chunks work, touching others is a fault, and
the process never holds more than the budget."""

import ctypes
import mmap
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.kvpool.memory import available_bytes
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer

CHUNK = 2 << 20
CHUNKS = 40


@pytest.fixture
def pool():
    with MremapVirtualizer(CHUNKS * CHUNK, CHUNK, dict.fromkeys(range(2), CHUNKS * CHUNK)) as pool:
        yield pool


def chunk_view(pool: MremapVirtualizer, model: int) -> torch.Tensor:
    return pool.tensor(model, (CHUNKS, CHUNK // 8), torch.int64)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def test_mapped_chunks_hold_what_is_written(pool):
    chunks = random.Random(1).sample(range(CHUNKS), CHUNKS)
    halves = chunks[: CHUNKS // 2], chunks[CHUNKS // 2 :]
    for model, half in enumerate(halves):
        for chunk in half:
            pool.map(model, [chunk])
            chunk_view(pool, model)[chunk] = 1000 * model + chunk
    pool.unmap(0, halves[0][:10])
    pool.map(0, halves[0][:10])
    for chunk in halves[0][:10]:
        chunk_view(pool, 0)[chunk] = -chunk
    for model, half in enumerate(halves):
        for position, chunk in enumerate(half):
            rewritten = model == 0 and position < 10
            expected = -chunk if rewritten else 1000 * model + chunk
            assert (chunk_view(pool, model)[chunk] == expected).all()


def test_bytes_are_counted(pool):
    assert (pool.free_bytes, pool.mapped_bytes(0), pool.mapped_bytes(1)) == (CHUNKS * CHUNK, 0, 0)
    pool.map(0, [3, 4, 5])
    pool.map(1, [3])
    pool.map(1, [])
    assert pool.mapped_bytes(0) == 3 * CHUNK
    assert pool.mapped_bytes(1) == CHUNK
    pool.unmap(0, [4])
    assert pool.mapped_bytes(0) == 2 * CHUNK
    assert pool.free_bytes == (CHUNKS - 3) * CHUNK


def test_memory_given_up_by_one_model_serves_the_next(pool):
    part = list(range(CHUNKS * 8 // 10))
    before = resident_bytes()
    for turn in range(6):
        model = turn % 2
        pool.map(model, part)
        chunk_view(pool, model)[: len(part)] = turn
        low, high = chunk_view(pool, model)[: len(part)].aminmax()
        assert (low, high) == (turn, turn)
        pool.unmap(model, part)
        assert resident_bytes() - before < 4 * CHUNK


def test_a_wrong_chunk_changes_nothing(pool):
    pool.map(0, [1, 2])
    for chunks in ([2, 3], [3, 3], [CHUNKS], [-1], [*range(3, CHUNKS), CHUNKS]):
        with pytest.raises(ValueError, match="mapped or out of range"):
            pool.map(0, chunks)
    pool.map(1, list(range(CHUNKS - 2)))
    with pytest.raises(ValueError, match="1 chunks to map, 0 are free"):
        pool.map(0, [0])
    for chunks in ([0], [1, 1], [1, 3]):
        with pytest.raises(ValueError, match="not mapped"):
            pool.unmap(0, chunks)
    assert pool.mapped_bytes(0) == 2 * CHUNK


def test_a_tensor_beyond_the_range_is_refused(pool):
    assert pool.tensor(0, (CHUNKS, 2, CHUNK // 4), torch.bfloat16).shape == (CHUNKS, 2, CHUNK // 4)
    with pytest.raises(ValueError, match="its range has"):
        pool.tensor(0, (CHUNKS * CHUNK // 2 + 1,), torch.bfloat16)


def test_ranges_never_have_a_hole_that_another_mapping_takes(pool):
    first = [chunk_view(pool, model).data_ptr() for model in range(2)]
    taken, stop = [], threading.Event()

    def map_elsewhere() -> None:
        while not stop.is_set():
            mappings = [mmap.mmap(-1, CHUNK) for _ in range(8)]
            for mapping in mappings:
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
                taken.extend(a for a in first if a <= address + CHUNK - 1 < a + CHUNKS * CHUNK)

    thread = threading.Thread(target=map_elsewhere)
    thread.start()
    try:
        chunks = random.Random(2).sample(range(CHUNKS), CHUNKS)
        for _ in range(50):
            for model in range(2):
                pool.map(model, chunks)
                chunk_view(pool, model)[:, 0] = model
                pool.unmap(model, chunks)
    finally:
        stop.set()
        thread.join()
    assert taken == []
    mapped = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    for begin in first:
        position = begin
        for low, high in spans:
            if low <= position < high:
                position = high
        assert position >= begin + CHUNKS * CHUNK


TOUCH = """
import sys, torch
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer
pool = MremapVirtualizer(8 << 20, 2 << 20, {0: 8 << 20})
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
        [sys.executable, "-c", TOUCH, str(chunk)], capture_output=True, check=False, timeout=120
    )
    assert done.stdout == b"mapped is fine\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_progress_reaches_the_rounded_budget():
    seen = []
    with MremapVirtualizer(130 * (1 << 20) + 12345, CHUNK, {0: 1}, progress=seen.append) as pool:
        assert pool.budget_bytes == pool.free_bytes == 130 << 20
        pool.map(0, [0])
    assert sum(seen) == 130 << 20
    assert len(seen) > 2
    assert min(seen) > 0


def test_the_pool_is_there_before_its_first_use(pool):
    before = resident_bytes()
    pool.map(0, list(range(CHUNKS)))
    chunk_view(pool, 0).fill_(1)
    assert resident_bytes() - before < 2 * CHUNK


def test_closing_gives_the_memory_back():
    before = resident_bytes()
    pool = MremapVirtualizer(CHUNKS * CHUNK, CHUNK, {0: CHUNKS * CHUNK})
    pool.map(0, [0, 7])
    assert resident_bytes() - before > (CHUNKS - 2) * CHUNK
    pool.close()
    pool.close()
    assert resident_bytes() - before < 2 * CHUNK


def test_more_than_the_available_memory_is_refused_before_it_is_touched():
    with pytest.raises(ConfigError, match=r"kv_pool_bytes: \d+ bytes"):
        MremapVirtualizer(2 * available_bytes() + (1 << 30), 1 << 30, {0: 1 << 30})


def test_refused_address_space_names_the_field():
    script = """
import resource
from crosspool.config.errors import ConfigError
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    MremapVirtualizer(4 << 30, 2 << 20, {0: 4 << 30})
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True, timeout=60
    )
    assert "kv_pool_bytes" in done.stdout
    assert "Cannot allocate memory" in done.stdout


def test_more_chunks_than_mappings_names_the_chunk_size():
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    with pytest.raises(ConfigError, match=r"chunk_bytes: .* chunk_bytes of [0-9]+ would do"):
        MremapVirtualizer(most * CHUNK, CHUNK, {0: CHUNK})


@pytest.mark.parametrize(
    ("budget", "chunk", "field"),
    [(CHUNK - 1, CHUNK, "kv_pool_bytes"), (CHUNK, 3 << 19, "chunk_bytes"), (8, 0, "chunk_bytes")],
)
def test_bad_sizes_name_the_field(budget, chunk, field):
    with pytest.raises(ConfigError, match=field):
        MremapVirtualizer(budget, chunk, {0: CHUNK})


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    """Memory of the group's file cache that can be given up counts as available."""
    group = tmp_path / "cgroup/a/b"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    parent = group.parent
    (parent / "memory.max").write_text("1000000\n")
    (parent / "memory.current").write_text("900000\n")
    (parent / "memory.stat").write_text("anon 100\ninactive_file 50000\n")
    (tmp_path / "self").write_text("0::/a/b\n")
    monkeypatch.setattr("crosspool.kvpool.memory.MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr("crosspool.kvpool.memory.MEMBERSHIP", tmp_path / "self")
    assert available_bytes() == 150_000
    with pytest.raises(ConfigError, match="150000 bytes of memory"):
        MremapVirtualizer(CHUNK, CHUNK, {0: CHUNK})
