"""Packed weights that were kept: the same bytes as weights that were packed just now, and never
those of a damaged file or another checkpoint."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Team, set_checksums
from crosspool.models.registry import read_model
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.kept_weights import WeightKeeper
from crosspool.ranks.resident.reading import ReadingOrder, SleepingPart
from crosspool.weightpool.gguf_checkpoint import open_checkpoint
from crosspool.weightpool.packed_cache import PackedCache
from crosspool.weightpool.packed_file import DamagedFile
from crosspool.weightpool.placement import FFNShard
from safetensors.torch import load_file, save_file

from benchmark.server import DEMO, TINY_MODELS

Part = PackedAttention | PackedFFN
SHARDS = {
    "whole": FFNShard(rank=0, ranks=1, parallel="tp"),
    "half of each expert": FFNShard(rank=1, ranks=2, parallel="tp"),
    "half of the experts": FFNShard(rank=1, ranks=2, parallel="ep"),
}
PARTS = ["attention", *SHARDS]


@pytest.fixture
def team() -> Iterator[Team]:
    with Team([-1, -1, -1]) as team:
        yield team


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def keeper(folder: Path) -> WeightKeeper:
    return WeightKeeper(PackedCache(folder, 1 << 30, time.time_ns()))


def load(
    team: Team,
    model: Path,
    part: str = "whole",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    cache: Path | None = None,
) -> Part:
    """Load a part of a model, and keep it if it was not kept before."""
    spec = read_model(model, None, dtype)
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes

    keeping = None if cache is None else keeper(cache)
    kept = None if keeping is None else keeping.of(model.name)
    if part == "attention":
        loaded: Part = PackedAttention(spec, model, 64)
    else:
        loaded = PackedFFN(spec, model, SHARDS[part])
    loaded.load(team, progress, kept)
    assert done == sum(listing.bytes for listing in loaded.tensors())
    if keeping is not None:
        keeping.write()
    return loaded


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


def held(part: Part) -> tuple[Any, ...]:
    """Everything that native code reads of a part, but for where it lies."""
    image = part.weights.image()
    return (
        ctypes.string_at(image.arena, image.bytes),
        [
            ((matrix.data or 0) - image.arena, matrix.n, matrix.k, matrix.dtype, matrix.encoding)
            for matrix in image.matrices
        ],
        [array.view(torch.uint8).numpy().tobytes() for array in image.arrays],
        part.tensors(),
        part.weights.plain_bytes,
        [table.tolist() for table in (part._cos, part._sin)]
        if isinstance(part, PackedAttention)
        else [],
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_the_same_bytes_as_packed_anew(
    team: Team, folder: Path, model: str, part: str, dtype: Literal["bfloat16", "float32"]
) -> None:
    fresh = load(team, DEMO / model, part, dtype)
    first = load(team, DEMO / model, part, dtype, folder)
    second = load(team, DEMO / model, part, dtype, folder)
    kept = [one.weights.was_kept for one in (fresh, first, second)]
    assert kept == [False, False, True]
    assert held(first) == held(fresh)
    assert held(second) == held(fresh)
    assert len(files(folder)) == 1
    for one in (fresh, first, second):
        one.close()


@pytest.mark.parametrize("model", TINY_MODELS)
def test_the_order_of_reading_is_worked_out_once(team: Team, folder: Path, model: str) -> None:
    path = DEMO / model
    parts = [load(team, path, part, cache=folder) for part in ("attention", "whole")]
    sleeping = [
        SleepingPart(
            part, keeper(folder).of(path.name), part.weights.form(open_checkpoint(path)).key()
        )
        for part in parts
    ]
    order, found = ReadingOrder(sleeping), []
    for of in (order, order, ReadingOrder(sleeping)):
        opened = [of.open(0), of.open(1)]
        staged = of.staged(opened)
        files_of = {part.native: one.file for part, one in zip(parts, opened, strict=True)}
        assert all(stage.file == files_of[stage.part] for stage in staged[2])
        found.append((staged, *map(_read_only, staged)))
        for one in opened:
            os.close(one.file)
    assert found[0][0] is found[1][0]
    assert found[0][0] is not found[2][0]
    assert found[0][1:] == found[1][1:] == found[2][1:]
    # Another file of the same name is looked at.
    damaged = files(folder)[0]
    data = bytearray(damaged.read_bytes())
    data[20] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DamagedFile):
        for number in (0, 1):
            os.close(order.open(number).file)
    assert not damaged.exists()
    for part in parts:
        part.close()


def _read_only(array: Any) -> list[tuple[Any, ...]]:
    """What an array tells native code, but for open files and for checksums that it writes."""
    left_out = ("file", "checksum")
    return [
        tuple(getattr(one, name) for name, _ in one._fields_ if name not in left_out)
        if isinstance(one, ctypes.Structure)
        else (one,)
        for one in array
    ]


def test_every_part_dtype_and_share_has_a_file_of_its_own(team: Team, folder: Path) -> None:
    model = DEMO / TINY_MODELS[0]
    for number, part in enumerate(PARTS, 1):
        load(team, model, part, cache=folder).close()
        assert len(files(folder)) == number
    again = load(team, model, PARTS[0], "float32", folder)
    assert not again.weights.was_kept
    again.close()


def test_a_matrix_of_another_library_is_packed_anew(
    team: Team, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosspool.ranks.resident import kept_weights

    load(team, DEMO / TINY_MODELS[0], cache=folder).close()
    for what in ("_library_digest", "default_isa"):
        with monkeypatch.context() as patched:
            patched.setattr(kept_weights, what, lambda: "another")
            (before,) = files(folder)
            loaded = load(team, DEMO / TINY_MODELS[0], cache=folder)
            assert not loaded.weights.was_kept
            loaded.close()
            for file in files(folder):
                if file != before:
                    file.unlink()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(DEMO / TINY_MODELS[0], tmp_path / "model"))


def test_a_changed_checkpoint_is_packed_anew(team: Team, folder: Path, model: Path) -> None:
    """Even if sizes, headers and times of change are those of before."""
    load(team, model, cache=folder).close()
    file = model / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            tensors[name] = -tensor
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    changed = load(team, model, cache=folder)
    assert not changed.weights.was_kept
    fresh = load(team, model)
    assert held(changed) == held(fresh)
    changed.close()
    fresh.close()


def test_a_checkpoint_that_changes_meanwhile_is_not_kept(
    team: Team, folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeping = keeper(folder)
    spec = read_model(model, None, "bfloat16")
    part = PackedFFN(spec, model, SHARDS["whole"])
    part.load(team, lambda done: None, keeping.of("m"))
    (model / "model.safetensors").touch()
    with caplog.at_level(logging.WARNING):
        keeping.write()
    assert "m has changed" in caplog.text
    assert list(folder.iterdir()) == []
    part.close()


def cut(data: bytearray) -> None:
    del data[-100:]


def empty(data: bytearray) -> None:
    data.clear()


def foreign(data: bytearray) -> None:
    data[:8] = b"PK\3\4\0\0\0\0"


def flip_table(data: bytearray) -> None:
    data[60] ^= 1


def flip_weight(data: bytearray) -> None:
    data[len(data) // 2] ^= 4


def flip_last(data: bytearray) -> None:
    data[-1] ^= 128


def zero_tail(data: bytearray) -> None:
    data[-5000:] = bytes(5000)


@pytest.mark.parametrize(
    "damage", [cut, empty, foreign, flip_table, flip_weight, flip_last, zero_tail]
)
@pytest.mark.parametrize("part", ["attention", "whole"])
def test_a_damaged_file_is_replaced(
    team: Team,
    folder: Path,
    part: str,
    damage: Callable[[bytearray], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = DEMO / TINY_MODELS[0]
    load(team, model, part, cache=folder).close()
    (file,) = files(folder)
    right = file.read_bytes()
    data = bytearray(right)
    damage(data)
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        loaded = load(team, model, part, cache=folder)
    assert not loaded.weights.was_kept
    assert f"{file} is removed" in caplog.text
    fresh = load(team, model, part)
    assert held(loaded) == held(fresh)
    assert file.read_bytes() == right
    loaded.close()
    fresh.close()


def test_a_file_under_another_name_is_not_taken(team: Team, folder: Path, model: Path) -> None:
    load(team, model, "half of each expert", cache=folder).close()
    (other,) = files(folder)
    taken = other.rename(folder / "taken")
    load(team, model, "half of the experts", cache=folder).close()
    (own,) = files(folder)
    taken.replace(own)
    loaded = load(team, model, "half of the experts", cache=folder)
    assert not loaded.weights.was_kept
    loaded.close()


def test_what_is_broken_in_a_checkpoint_is_told_each_time(
    team: Team, folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    for kept in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = load(team, model, cache=folder)
        assert loaded.weights.was_kept == kept
        assert f"NaN or infinite values, the first is {name}" in caplog.text
        loaded.close()


def test_without_room_the_device_goes_on(
    team: Team, folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeping = WeightKeeper(PackedCache(folder, 1000, time.time_ns()))
    spec = read_model(model, None, "bfloat16")
    part = PackedFFN(spec, model, SHARDS["whole"])
    part.load(team, lambda done: None, keeping.of("m"))
    with caplog.at_level(logging.WARNING):
        keeping.write()
    assert "the packed weights of m are not kept" in caplog.text
    assert "packed_cache_bytes" in caplog.text
    assert list(folder.iterdir()) == []
    part.close()


def test_a_checkpoint_without_its_file_is_a_mistake_of_the_user(
    team: Team, folder: Path, model: Path
) -> None:
    load(team, model, cache=folder).close()
    (model / "model.safetensors").rename(model / "elsewhere")
    with pytest.raises(ConfigError, match="safetensors"):
        load(team, model, cache=folder)


def test_a_change_of_any_word_changes_the_checksum(team: Team, tmp_path: Path) -> None:
    """Also two units that change places; and reading with any number of threads finds the same."""
    generator = np.random.default_rng(1)
    data = generator.integers(0, 256, 7 * 200, dtype=np.uint8)
    file = tmp_path / "file"
    file.write_bytes(b"before" + data.tobytes())

    def sum_of(values: np.ndarray) -> int:
        spans = (es.Span * 1)(es.Span(values.ctypes.data, 0, 0, 200, 7))
        set_checksums(spans)
        return int(spans[0].checksum)

    right = sum_of(data)
    for at in range(len(data)):
        changed = data.copy()
        changed[at] ^= 1 << int(generator.integers(8))
        assert sum_of(changed) != right, at
    swapped = data.reshape(7, 200)[[1, 0, 2, 3, 4, 5, 6]].copy()
    assert sum_of(swapped) != right
    for threads in (1, 2, 5):
        into = np.zeros_like(data)
        spans = (es.Span * 1)(es.Span(into.ctypes.data, 6, 0, 200, 7))
        with Team([-1] * threads) as several, file.open("rb") as opened:
            several.read(opened.fileno(), spans)
        assert np.array_equal(into, data)
        assert spans[0].checksum == right
    with file.open("rb") as opened, pytest.raises(OSError, match="No data"):
        team.read(opened.fileno(), (es.Span * 1)(es.Span(into.ctypes.data, 7, 0, 200, 7)))
    with pytest.raises(OSError, match="Bad file"):
        team.read(-1, spans)
