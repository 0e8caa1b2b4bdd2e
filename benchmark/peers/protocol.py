"""Drives the engines that are compared: each is a process that takes JSON lines through pipes.

    {"do": "load", "checkpoint": folder, "threads": n, "cores": [...]}  -> {"engine": ..., ...}
    {"do": "decode", "batch": b, "context": c, "steps": n}
        -> {"step_ms": [...], "started_s": [...], "cpu_s": seconds}
    {"do": "prefill", "tokens": t, "repeats": r}                        -> {"seconds": [...]}
    {"do": "tokens", "prompt": [ids], "steps": n}                       -> {"tokens": [ids]}
    {"do": "losses", "rows": [[ids], ...]}                              -> {"losses": [[nats], ...]}
    {"do": "moe", "batch": b, "repeats": layers}                        -> {"layer_us": [...]}
    {"do": "moe_error", "batch": b}                                     -> {"relative_error": e}
    {"do": "quit"}                                                      -> {}

``load`` comes first and once: cores and threads are limited before the engine's libraries are
imported. A step of ``decode`` makes one greedy token for every sequence, each with a KV cache of
``context`` tokens; four steps before are not counted. ``started_s`` are the steps' starts on the
machine's monotonic clock, by which steps of two processes are matched. ``cpu_s`` is the CPU time of
all threads of the process in the counted steps. ``tokens`` are greedy continuations, which show
that an engine computes the same model, and ``losses`` what each token of a row but the first costs
after those before it. The reply to a request that fails is {"error": text}.

The engines' environments contain nothing of this project: this module and those of the engines
import the standard library, and an engine's packages when it is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 4
"""Steps of a decode that are not counted."""

Message = dict[str, Any]


class Engine(Protocol):
    """One loaded engine. An engine that is asked for less leaves methods out."""

    def about(self) -> Message:
        """Return names and versions of what runs, and the settings that it chose."""
        ...

    def start(self, prompts: Sequence[Sequence[int]], steps: int) -> Callable[[], list[int]]:
        """Read the prompts, all of one length, and return a step. Every call of it appends the last
        greedy token of each sequence and returns the next ones. It is called at most ``steps``
        times."""
        ...

    def prefill(self, prompt: Sequence[int]) -> None:
        """Read one prompt, to its first token."""
        ...

    def losses(self, row: Sequence[int]) -> list[float]:
        """Return the negative logarithm of the probability of each token but the first."""
        ...

    def cpu_seconds(self) -> float:
        """Return the CPU time so far. Without this method it is that of the process."""
        ...


# The side of the engine


def serve(load: Callable[[Path, int, list[int]], Any]) -> None:
    """Reply to requests on stdin until ``quit`` or its end. ``load(checkpoint, threads, cores)``
    makes the engine. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # unbuffered, so that the log is complete when the engine hangs
    engine: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["do"] == "quit":
                answer: Message = {}
            elif asked["do"] == "load":
                limit(asked["threads"], asked["cores"])
                engine = load(Path(asked["checkpoint"]), asked["threads"], asked["cores"])
                answer = engine.about()
            else:
                answer = _ANSWERS[asked["do"]](engine, asked)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        if asked["do"] == "quit":
            break
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # some engines' exit handlers wait for minutes


def limit(threads: int, cores: Sequence[int]) -> None:
    """Pin the process, and so every thread that it will start, and bound its thread pools."""
    os.sched_setaffinity(0, cores)
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON"):
        os.environ[f"{name}_NUM_THREADS"] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def random_ids(vocabulary: int, count: int, seed: int) -> list[int]:
    """Draw token ids, leaving out the first few, which may be special."""
    import random

    return random.Random(seed).choices(range(3, vocabulary), k=count)


def _cpu_seconds(engine: Any) -> float:
    return float(getattr(engine, "cpu_seconds", time.process_time)())


def _decode(engine: Any, asked: Message) -> Message:
    batch, context, steps = asked["batch"], asked["context"], asked["steps"]
    prompts = [random_ids(engine.vocabulary, context, seed) for seed in range(batch)]
    step = engine.start(prompts, WARM_UP + steps)
    for _ in range(WARM_UP):
        step()
    started, ended = [], []
    cpu = _cpu_seconds(engine)
    for _ in range(steps):
        started.append(time.monotonic())
        step()
        ended.append(time.monotonic())
    cpu = _cpu_seconds(engine) - cpu
    return {
        "step_ms": [1e3 * (end - start) for start, end in zip(started, ended, strict=True)],
        "started_s": started,
        "cpu_s": cpu,
    }


def _prefill(engine: Any, asked: Message) -> Message:
    seconds = []
    cpu = _cpu_seconds(engine)
    for seed in range(asked["repeats"] + 1):
        prompt = random_ids(engine.vocabulary, asked["tokens"], seed)
        start = time.monotonic()
        if seed == 1:
            cpu = _cpu_seconds(engine)
        engine.prefill(prompt)
        seconds.append(time.monotonic() - start)
    return {"seconds": seconds[1:], "cpu_s": _cpu_seconds(engine) - cpu}


def _tokens(engine: Any, asked: Message) -> Message:
    step = engine.start([asked["prompt"]], asked["steps"])
    return {"tokens": [step()[0] for _ in range(asked["steps"])]}


def _losses(engine: Any, asked: Message) -> Message:
    return {"losses": [engine.losses(row) for row in asked["rows"]]}


def _moe(engine: Any, asked: Message) -> Message:
    cpu = _cpu_seconds(engine)
    layer_us = engine.moe(asked["batch"], asked["repeats"])
    return {"layer_us": layer_us, "cpu_s": _cpu_seconds(engine) - cpu}


def _moe_error(engine: Any, asked: Message) -> Message:
    return {"relative_error": engine.error(asked["batch"])}


_STOP_SECONDS = 5.0

_ANSWERS: dict[str, Callable[[Any, Message], Message]] = {
    "decode": _decode,
    "prefill": _prefill,
    "tokens": _tokens,
    "losses": _losses,
    "moe": _moe,
    "moe_error": _moe_error,
}


# The side of the benchmark


class ContestantError(RuntimeError):
    """An engine failed, died or took too long; the message ends with its last lines of output."""


class Contestant:
    """Process of one engine. It is stopped while it has no request: spinning threads of an idle
    engine would take the cores from others.

    ``python`` is the interpreter of its environment, ``module`` the module that runs in it, for
    example ``benchmark.peers.vllm_peer``, and ``log`` the file of its output."""

    def __init__(
        self,
        python: Path,
        module: str,
        log: Path,
        *,
        paths: Sequence[Path] = (ROOT,),
        environment: dict[str, str] | None = None,
    ) -> None:
        # Only this side can import it: engines' environments contain nothing of this project.
        from crosspool.config.process import die_with_parent

        self.module = module
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        variables = {
            **os.environ,
            **(environment or {}),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=variables,
                cwd=ROOT,
                start_new_session=True,
                text=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=[self._process.stdout], daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._lines.put(line)
        self._lines.put("")

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(
        self, checkpoint: Path, threads: int, cores: Sequence[int], timeout_s: float = 900.0
    ) -> Message:
        return self.ask(
            {"do": "load", "checkpoint": str(checkpoint), "threads": threads, "cores": [*cores]},
            timeout_s,
        )

    def decode(self, batch: int, context: int, steps: int, timeout_s: float = 300.0) -> Message:
        return self.ask(
            {"do": "decode", "batch": batch, "context": context, "steps": steps}, timeout_s
        )

    def prefill(self, tokens: int, repeats: int, timeout_s: float = 300.0) -> Message:
        return self.ask({"do": "prefill", "tokens": tokens, "repeats": repeats}, timeout_s)

    def ask(self, message: Message, timeout_s: float) -> Message:
        self.send(message)
        return self.receive(timeout_s)

    def send(self, message: Message) -> None:
        """Send a request without waiting for the reply, so that several engines can work at
        once."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("died") from None

    def receive(self, timeout_s: float) -> Message:
        """Return the reply. Raises ContestantError if it is an error, if the process has died, and
        when time is up, which also ends the process."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._kill()
            raise self._error(f"did not answer in {timeout_s:.0f} s") from None
        if not line:
            raise self._error(f"died with status {self._process.wait()}")
        self._rest()
        answer: Message = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def close(self) -> None:
        """End the process. An idle and healthy engine ends by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # an idle engine ends at that
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10.0)
        self._kill()

    def _rest(self) -> None:
        """Stop the process, and wait until all its threads have stopped or it has ended."""
        self._signal(signal.SIGSTOP)
        ends = time.monotonic() + _STOP_SECONDS
        stopped = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
        while os.waitid(os.P_PID, self._process.pid, stopped) is None:
            if time.monotonic() > ends:
                raise self._error(f"did not stop in {_STOP_SECONDS:.0f} s")
            time.sleep(0.001)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _error(self, what: str) -> ContestantError:
        lines = self.log.read_text(errors="replace").splitlines()[-8:]
        return ContestantError(
            "\n  ".join([f"{self.module} {what}; its output ({self.log}):", *lines])
        )
