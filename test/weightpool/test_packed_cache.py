"""The folder of packed weights: bounds, writers that die, two writers at once, a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crosspool.weightpool.packed_cache import PackedCache, Unusable, default_folder

LONG_AGO = 0
FAR_AHEAD = (1 << 62) - 1


def keep(cache: PackedCache, name: str, data: bytes, age: float = 0) -> None:
    """Write a file, last used ``age`` seconds ago."""
    with cache.begun(name, len(data)) as new:
        assert new is not None
        os.pwrite(new.file, data, 0)
        cache.publish(new)
    used = time.time() - age
    os.utime(cache.path(name), (used, used))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_once_it_is_whole_and_for_nobody_else(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path / "cache", 1 << 20, LONG_AGO)
    with cache.opened("a") as file:
        assert file is None
    with cache.begun("a", 100) as new:
        assert new is not None
        with cache.opened("a") as file:
            assert file is None
        os.pwrite(new.file, b"x" * 100, 0)
        cache.publish(new)
    with cache.opened("a") as file:
        assert file is not None
        assert os.read(file, 200) == b"x" * 100
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert cache.path("a").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path / "cache") == ["a.packed"]
    cache.discard("a")
    cache.discard("a")
    assert names(tmp_path / "cache") == []


def test_a_file_that_was_not_published_is_removed(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path, 1 << 20, LONG_AGO)
    with pytest.raises(ZeroDivisionError), cache.begun("a", 100) as new:
        assert new is not None
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path, 1000, FAR_AHEAD)
    for age, name in enumerate(["newest", "middle", "oldest"]):
        keep(cache, name, bytes(300), age=100 * (age + 1))
    with cache.opened("oldest"):
        pass  # which makes it the newest
    keep(cache, "more", bytes(300))
    assert names(tmp_path) == ["more.packed", "newest.packed", "oldest.packed"]
    keep(cache, "large", bytes(900))
    assert names(tmp_path) == ["large.packed"]


def test_what_this_server_uses_does_not_make_room(tmp_path: Path) -> None:
    """Else a deployment that is too large for the bound would write everything at each start."""
    PackedCache(tmp_path, 1000, LONG_AGO)
    began = time.time_ns() - 10**9
    cache = PackedCache(tmp_path, 1000, began)
    keep(cache, "of another one", bytes(300), age=100)
    keep(cache, "ours", bytes(600))
    with pytest.raises(Unusable, match="packed_cache_bytes, 1000 B"), cache.begun("b", 500):
        pass
    assert names(tmp_path) == ["ours.packed"]


def test_a_file_that_takes_more_than_half_of_the_disk_is_not_begun(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path, 1 << 62, LONG_AGO)
    with pytest.raises(Unusable, match="half of the"), cache.begun("a", 1 << 60):
        pass
    assert names(tmp_path) == []


WITHOUT_ROOM = """
import resource, sys
from pathlib import Path
from crosspool.weightpool.packed_cache import PackedCache
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with PackedCache(Path(sys.argv[1]), 1 << 20, 0.0).begun("a", 8192):
    pass
"""


def test_without_room_nothing_is_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_ROOM, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "OSError: [Errno 27] File too large" in ended.stderr
    assert names(tmp_path) == []


def test_of_two_writers_one_writes(tmp_path: Path) -> None:
    first, second = (PackedCache(tmp_path, 1 << 20, LONG_AGO) for _ in range(2))
    with first.begun("a", 100) as new:
        assert new is not None
        with second.begun("a", 100) as other:
            assert other is None
        with second.begun("b", 100) as another:
            assert another is not None
        assert names(tmp_path) == ["a.part"]
        first.publish(new)
    with second.begun("a", 100) as other:
        assert other is None, "it is there already"
    assert names(tmp_path) == ["a.packed"]


def test_many_writers_at_once_leave_whole_files(tmp_path: Path) -> None:
    """Writers that come and go while others begin, publish and fail never touch what is there."""
    data = {name: name.encode() * 1000 for name in "abc"}

    def write(number: int) -> None:
        cache = PackedCache(tmp_path, 8000, LONG_AGO)
        name = "abc"[number % 3]
        with cache.begun(name, 1000) as new:
            if new is None:
                return
            os.pwrite(new.file, data[name], 0)
            if number % 4:
                cache.publish(new)
        if number % 5 == 0:
            cache.discard(name)
        with cache.opened(name) as file:
            assert file is None or os.read(file, 2000) == data[name]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(600)))
    for path in tmp_path.iterdir():
        assert path.suffix == ".packed"
        assert path.read_bytes() == data[path.stem]


WRITER = """
import os, sys, time
from pathlib import Path
from crosspool.weightpool.packed_cache import PackedCache
cache = PackedCache(Path(sys.argv[1]), 1 << 20, 0)
with cache.begun("a", 1000) as new:
    os.pwrite(new.file, b"half", 0)
    print("begun", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_leaves_is_neither_read_nor_in_the_way(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path, 1 << 20, LONG_AGO)
    for after in ("the same file", "another file"):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        with writer, writer.stdout:
            assert writer.stdout.readline() == "begun\n"
            with cache.begun("a", 100) as new:
                assert new is None, "the other process writes it"
            writer.send_signal(signal.SIGKILL)
        assert names(tmp_path) == ["a.part"]
        with cache.opened("a") as file:
            assert file is None
        if after == "the same file":
            keep(cache, "a", b"whole")
            assert cache.path("a").read_bytes() == b"whole"
            assert names(tmp_path) == ["a.packed"]
            cache.discard("a")
        else:
            keep(cache, "b", b"whole")
            assert names(tmp_path) == ["b.packed"]


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(Unusable, match="others may write to it"):
        PackedCache(tmp_path, 1 << 20, LONG_AGO)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(Unusable, match="cannot be used"):
        PackedCache(file / "folder", 1 << 20, LONG_AGO)


def test_the_folder_of_one_who_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/crosspool")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "crosspool"
