"""Other engines on the checkpoint. Those that are installed compute the same model, with the
threads and on the cores that they were given; a failure says what went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support.marks import slow_but
from transformers import AutoModelForCausalLM

from benchmark import checkpoint
from benchmark.peers.install import PEERS
from benchmark.peers.protocol import Contestant, ContestantError, random_ids

MODELS = [name for name in PEERS if name != "kt"]
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "tiny"
    checkpoint.write(path, checkpoint.TINY)
    return path


def loaded(name: str, folder: Path) -> Contestant:
    peer = PEERS[name]
    if not peer.installed:
        pytest.skip(f"{name} is not installed (make bench-peers)")
    contestant = peer.start()
    try:
        contestant.load(folder, 1, [min(os.sched_getaffinity(0))], TIMEOUT_S)
    except ContestantError:
        contestant.close()
        raise
    return contestant


@pytest.fixture(scope="module", params=slow_but(["transformers"], MODELS))
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Contestant]:
    with loaded(request.param, folder) as contestant:
        yield contestant


def test_greedy_tokens_are_the_models(engine: Contestant, folder: Path) -> None:
    prompt = random_ids(checkpoint.TINY.vocabulary, 40, seed=7)
    asked = {"do": "tokens", "prompt": prompt, "steps": 12}
    tokens = engine.ask(asked, TIMEOUT_S)["tokens"]
    assert len(tokens) == 12 and len(set(tokens)) > 4
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    behind = logits.max(-1).values - chosen
    # logits have a standard deviation of 2; bf16 may only swap what is nearly equal
    assert behind.max() < 0.3


def test_times_of_one_core(engine: Contestant) -> None:
    start = time.monotonic()
    answer = engine.decode(batch=2, context=64, steps=10, timeout_s=TIMEOUT_S)
    wall_s = time.monotonic() - start
    assert len(answer["step_ms"]) == len(answer["started_s"]) == 10
    assert all(start < began < start + wall_s for began in answer["started_s"])
    assert 0.0 < sum(answer["step_ms"]) / 1e3 < wall_s
    # one core was given: no more CPU time than time, but for the clocks' grain
    steps_s = answer["started_s"][-1] - answer["started_s"][0] + answer["step_ms"][-1] / 1e3
    assert 0.0 < answer["cpu_s"] < 1.1 * steps_s + 0.02
    affinities = {
        frozenset(os.sched_getaffinity(int(task.name)))
        for task in Path(f"/proc/{engine.pid}/task").iterdir()
    }
    assert affinities == {frozenset([min(os.sched_getaffinity(0))])}


def test_prefill(engine: Contestant) -> None:
    answer = engine.prefill(tokens=96, repeats=3, timeout_s=TIMEOUT_S)
    assert len(answer["seconds"]) == 3 and min(answer["seconds"]) > 0.0


def test_moe_layers_of_kt_kernel(folder: Path) -> None:
    with loaded("kt", folder) as contestant:
        answer = contestant.ask({"do": "moe", "batch": 3, "repeats": 5}, TIMEOUT_S)
        assert len(answer["layer_us"]) == 5 and min(answer["layer_us"]) > 0.0
        error = contestant.ask({"do": "moe_error", "batch": 3}, TIMEOUT_S)["relative_error"]
        assert error < 0.02


FAKE = """
import os, threading, time
from benchmark.peers import protocol

class Engine:
    vocabulary = 10
    def about(self):
        return {"affinity": sorted(os.sched_getaffinity(0)), "omp": os.environ["OMP_NUM_THREADS"]}
    def start(self, prompts, steps):
        print("chatter on stdout")
        if steps == 1:
            time.sleep(3600)
        calls = iter(range(steps))
        def step():
            return [next(calls)] * len(prompts)
        return step
    def prefill(self, prompt):
        os._exit(3)

def load(checkpoint, threads, cores):
    threading.Thread(target=spin, daemon=True).start()
    return Engine()

def spin():
    while True:
        time.sleep(0.001)

protocol.serve(load)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Contestant]:
    (tmp_path / "fake_engine.py").write_text(FAKE)
    root = Path(checkpoint.__file__).parents[1]
    log = tmp_path / "log"
    with Contestant(Path(sys.executable), "fake_engine", log, paths=[tmp_path, root]) as contestant:
        yield contestant


def test_protocol(fake: Contestant, tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    assert fake.load(tmp_path, 1, [core]) == {"affinity": [core], "omp": "1"}
    assert fake.ask({"do": "tokens", "prompt": [1], "steps": 3}, 30.0) == {"tokens": [0, 1, 2]}
    assert len(fake.decode(2, 4, 5)["step_ms"]) == 5
    # an error is told, and the engine goes on
    with pytest.raises(ContestantError, match="KeyError"):
        fake.ask({"do": "dance"}, 30.0)
    assert len(fake.decode(1, 4, 2)["step_ms"]) == 2
    assert "chatter on stdout" in (tmp_path / "log").read_text()
    with pytest.raises(ContestantError, match="died with status 3"):
        fake.prefill(16, 1)


def test_an_engine_at_rest_takes_no_core(fake: Contestant, tmp_path: Path) -> None:
    fake.load(tmp_path, 1, [max(os.sched_getaffinity(0))])
    process = psutil.Process(fake.pid)
    before = (process.num_ctx_switches(), process.cpu_times())
    time.sleep(0.3)
    assert (process.num_ctx_switches(), process.cpu_times()) == before
    assert process.status() == psutil.STATUS_STOPPED
    assert fake.ask({"do": "tokens", "prompt": [1], "steps": 2}, 30.0) == {"tokens": [0, 1]}


def test_an_engine_dies_with_who_started_it(tmp_path: Path) -> None:
    """The engine is stopped then, and so does not see that its input has ended."""
    (tmp_path / "fake_engine.py").write_text(FAKE)
    root = Path(checkpoint.__file__).parents[1]
    code = (
        "import os, sys; from pathlib import Path; from benchmark.peers.protocol import Contestant;"
        "folder = Path(sys.argv[1]); root = Path(sys.argv[2]);"
        "engine = Contestant("
        "    Path(sys.executable), 'fake_engine', folder / 'log', paths=[folder, root]);"
        "engine.load(folder, 1, [max(os.sched_getaffinity(0))]);"
        "print(engine.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(root)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=root, check=False
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_engine_that_hangs_is_ended(fake: Contestant, tmp_path: Path) -> None:
    fake.load(tmp_path, 1, [max(os.sched_getaffinity(0))])
    with pytest.raises(ContestantError, match="did not answer in 1 s"):
        fake.ask({"do": "tokens", "prompt": [1], "steps": 1}, timeout_s=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(fake.pid, 0)
