"""Reading safetensors: exact values, only the rank's own bytes, and clear errors for broken
files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crosspool.config.deployment import ConfigError
from crosspool.models.schemes import Joined, RowRange
from crosspool.models.spec import TensorRef
from crosspool.weightpool.checkpoint import Checkpoint, Read
from safetensors.torch import save_file

A = torch.arange(24, dtype=torch.float32).view(4, 6) / 7
B = torch.randn(3, 5).to(torch.bfloat16)


def _ref(name: str, shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(key=name, name=name, shape=shape)


@pytest.fixture(params=["single", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "single":
        save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
        return tmp_path
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    _index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def _index(folder: Path, files: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_parts_of_tensors_go_where_they_belong(folder: Path) -> None:
    stack = torch.full((2, 3, 2), torch.nan, dtype=torch.bfloat16)
    whole = torch.empty(3, 5)
    reads = [
        Read(_ref("a", (4, 6)), (slice(1, 4), slice(2, 4)), stack[1]),
        Read(_ref("b", (3, 5)), (slice(0, 3), slice(0, 5)), whole),
    ]
    checkpoint = Checkpoint(folder)
    checkpoint.check([read.ref for read in reads])
    progress: list[int] = []
    checkpoint.load(reads, progress.append)
    assert stack[0].isnan().all()
    torch.testing.assert_close(stack[1], A[1:4, 2:4].to(torch.bfloat16), atol=0, rtol=0)
    torch.testing.assert_close(whole, B.float(), atol=0, rtol=0)
    assert sorted(progress) == [stack[1].nbytes, whole.nbytes]


def test_rows_of_several_tensors(folder: Path) -> None:
    """Two runs of rows of each part come in turns; the first two parts lie in one tensor."""
    c = torch.randn(2, 6)
    save_file({"c": c}, folder / "three.safetensors")
    files = dict.fromkeys("ab", "model.safetensors")
    if not (folder / "model.safetensors").exists():
        files = {"a": "one.safetensors", "b": "two.safetensors"}
    _index(folder, files)
    parts = (RowRange("a", 4, 2, 2), RowRange("a", 4, 0, 2), RowRange("c", 2, 0, 2))
    ref = replace(_ref("a", (6, 6)), joined=Joined(groups=2, parts=parts))
    with pytest.raises(ConfigError, match="the checkpoint has no tensor c"):
        Checkpoint(folder).check([ref])
    _index(folder, files | {"c": "three.safetensors"})
    checkpoint = Checkpoint(folder)
    checkpoint.check([ref])
    expected = torch.stack((A[2], A[0], c[0], A[3], A[1], c[1]))
    whole, part = (slice(0, 6), slice(0, 6)), (slice(1, 5), slice(2, 4))
    found = dict(checkpoint.stream([(ref, whole), (ref, part)]))
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected[1:5, 2:4])
    short = replace(parts[2], height=3)
    wrong = replace(ref, joined=Joined(groups=2, parts=(*parts[:2], short)))
    with pytest.raises(ConfigError, match=r"tensor c has shape \[2, 6\], config.json asks for"):
        checkpoint.check([wrong])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_that_are_not_finite_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float, dtype: torch.dtype
) -> None:
    """Large values, whose sum float16 does not hold, are finite."""
    tensors = {name: torch.full((4, 6), 60000, dtype=dtype) for name in ("a", "b", "c", "d")}
    tensors["b"][3, 5] = tensors["c"][0, 0] = value
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    half = (slice(0, 2), slice(0, 6))
    list(checkpoint.stream([(_ref(name, (4, 6)), half) for name in ("a", "b", "d")]))
    assert caplog.text == ""  # the share that is read has none
    list(checkpoint.stream([(_ref(name, (4, 6)), half) for name in tensors]))
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"{tmp_path}: 1 tensor(s) hold NaN or infinite values, the first is c:")


def test_missing_tensor_and_wrong_shape_are_named(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    with pytest.raises(ConfigError, match=r"no tensor model\.missing"):
        checkpoint.check([_ref("a", (4, 6)), _ref("model.missing", (1,))])
    with pytest.raises(ConfigError, match=r"tensor b has shape \[3, 5\].*\[5, 3\]"):
        checkpoint.check([_ref("b", (5, 3))])


def test_index_that_promises_what_the_file_lacks(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    _index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "gone.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"one\.safetensors: tensor b is missing"):
        checkpoint.check([_ref("b", (3, 5))])
    with pytest.raises(ConfigError, match=r"gone\.safetensors cannot be read"):
        checkpoint.check([_ref("c", (3, 5))])


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        Checkpoint(tmp_path)
    _index(tmp_path, {"a": "../elsewhere.safetensors"})
    with pytest.raises(ConfigError, match="file of the same folder"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="weight_map"):
        Checkpoint(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        Checkpoint(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="tensor a is I8"):
        Checkpoint(tmp_path).check([_ref("a", (2,))])


_PEAK = """
import sys, pathlib, torch
from crosspool.weightpool.checkpoint import Checkpoint, Read
from crosspool.models.spec import TensorRef
refs = [TensorRef(key=str(i), name=str(i), shape=(1024, 1024)) for i in range(16)]
whole = (slice(0, 1024), slice(0, 1024))
stack = torch.zeros(16, 1024, 1024, dtype=torch.bfloat16).fill_(1)
checkpoint = Checkpoint(pathlib.Path(sys.argv[1]))
def anonymous():
    fields = dict(l.split(":", 1) for l in open("/proc/self/status") if ":" in l)
    return int(fields["RssAnon"].split()[0])
before, peak = anonymous(), [0]
def watch(_):
    peak[0] = max(peak[0], anonymous())
checkpoint.load([Read(r, whole, stack[i]) for i, r in enumerate(refs)], watch)
print(peak[0] - before)
"""


def test_memory_stays_within_about_one_tensor_of_the_result(tmp_path: Path) -> None:
    """Reads 16 float32 tensors of 4 MiB into one bfloat16 stack that is there already."""
    tensors = {str(i): torch.full((1024, 1024), float(i)) for i in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 3 * 4096  # KiB: three tensors
