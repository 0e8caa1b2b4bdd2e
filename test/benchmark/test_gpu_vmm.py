"""The measurement of the driver's calls, with the fake driver in the GPU's place: every call that
the rows name is made, what ran beside it is seen, and everything is given back."""

from __future__ import annotations

import contextlib
import json

import pytest
from support.fake_cuda_memory import FakeCuda

from benchmark import gpu_vmm
from benchmark.records import Recorder

CHUNK = 4 << 20


@pytest.fixture
def driver():
    return FakeCuda(total=16 * CHUNK)


def test_every_call_is_measured(driver, tmp_path):
    recorder = Recorder("gpu_vmm")
    gpu_vmm.measure_calls(
        driver,
        recorder,
        gpu="none",
        chunk_bytes=CHUNK,
        chunks=16,
        beside="alone",
        running=gpu_vmm.nothing,
    )
    assert driver.is_clean
    rows = [json.loads(line) for line in recorder.write(tmp_path).read_text().splitlines()]
    assert {row["name"]: (row["n"], row["waited"]) for row in rows} == {
        "reserve": (1, 0),
        "create": (16, 0),
        "map": (32, 0),
        "set access": (16, 0),
        "set access, run": (2, 0),
        "unmap": (32, 0),
        "export": (8, 0),
        "import": (8, 0),
        "release": (16, 0),
        "free reservation": (1, 0),
    }
    for row in rows:
        assert (row["unit"], row["gpu"]) == ("us", "none")
        assert row["parameters"] == {"chunk_bytes": CHUNK, "beside": "alone"}
        assert 0 < row["median"] <= row["p99"]


def test_a_call_that_waits_for_what_runs_is_seen(driver):
    """Here the driver's unmap ends what runs."""
    state = {"running": False, "begun": 0}

    @contextlib.contextmanager
    def loop():
        state["running"] = True
        state["begun"] += 1
        yield lambda: state["running"]

    class Waiting(FakeCuda):
        def unmap(self, address, nbytes):
            super().unmap(address, nbytes)
            state["running"] = False

    recorder = Recorder("gpu_vmm")
    gpu_vmm.measure_calls(
        Waiting(total=16 * CHUNK),
        recorder,
        gpu="none",
        chunk_bytes=CHUNK,
        chunks=8,
        beside="loop",
        running=loop,
    )
    assert state["begun"] == sum(row["n"] for row in recorder.rows)
    assert {row["name"] for row in recorder.rows if row["waited"]} == {"unmap"}
    assert next(row["waited"] for row in recorder.rows if row["name"] == "unmap") == 1


def test_access_that_is_not_ready_is_asked_for_again_and_counted(driver):
    driver.not_ready = 3
    recorder = Recorder("gpu_vmm")
    gpu_vmm.measure_calls(
        driver,
        recorder,
        gpu="none",
        chunk_bytes=CHUNK,
        chunks=8,
        beside="alone",
        running=gpu_vmm.nothing,
    )
    assert driver.is_clean
    assert {row["name"] for row in recorder.rows if row["not_ready"] != 0} == {"set access"}
    assert next(row["not_ready"] for row in recorder.rows if row["name"] == "set access") == 3


def test_the_pool_is_measured_by_neighbours_and_by_single_chunks(driver):
    recorder = Recorder("gpu_vmm")
    gpu_vmm.measure_pool(driver, recorder, gpu="none", chunk_bytes=CHUNK, chunks=16)
    assert driver.is_clean
    seen = [(row["name"], row["parameters"]["pattern"], row["n"]) for row in recorder.rows]
    assert seen == [
        ("pool map", "neighbours", 4),
        ("pool unmap", "neighbours", 4),
        ("pool map", "single", 2),
        ("pool unmap", "single", 2),
    ]
    runs = sum(name == "set_access" for name, _ in driver.calls)
    assert runs == 4 + 2 * 8


def test_chunks_come_in_runs(capsys):
    with pytest.raises(SystemExit):
        gpu_vmm.main(["--chunks", "12"])
    assert "12 is no multiple of 8" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_benchmark_runs_on_a_gpu(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    monkeypatch.setattr(Recorder, "write", lambda self: tmp_path)
    assert gpu_vmm.main(["--chunk-mib", "2", "--chunks", "8"]) == 0
    assert "set access" in capsys.readouterr().out
