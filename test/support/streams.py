"""Streams of a server whose processes die meanwhile: what each answered, and its longest pause."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.server import Server

_PROMPTS = ("The import statement", "A list of", "x", "While the module is")


@dataclass(frozen=True)
class Ask:
    """A request for one model, streamed."""

    model: str
    body: Any

    def tokens(self, server: Server, times: list[float] | None = None) -> list[tuple[int, float]]:
        """The pairs (token, log-probability) of a whole answer; adds to ``times`` when each part of
        it came. Raises AssertionError or OSError when the request fails."""
        request = urllib.request.Request(
            f"{server.url}/m/{self.model}/generate",
            data=json.dumps(self.body).encode(),
            headers={"Content-Type": "application/json"},
        )
        last: Any = None
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                word = line.decode().strip().removeprefix("data: ")
                if not word or word == "[DONE]":
                    continue
                if times is not None:
                    times.append(time.monotonic())
                last = json.loads(word)
                assert "error" not in last, last
        info = last["meta_info"]
        assert info["finish_reason"]["type"] in ("length", "stop"), info
        assert info["completion_tokens"] == len(info["output_token_logprobs"])
        return [(token, logprob) for logprob, token, _ in info["output_token_logprobs"]]


def asks(models: Sequence[str], count: int, new_tokens: int = 150) -> list[Ask]:
    """Different requests, over ``models`` in turn: greedy ones, and ones that are drawn, with
    penalties or under a grammar."""
    found = []
    for index in range(count):
        kinds: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0.9, "sampling_seed": 100 + index, "top_k": 50},
            {"temperature": 0.7, "sampling_seed": index, "frequency_penalty": 0.3},
            {"temperature": 0.8, "sampling_seed": index, "regex": "[a-z ]{60,200}"},
        ]
        sampling = {"max_new_tokens": new_tokens, "ignore_eos": True}
        sampling |= kinds[index // len(models) % len(kinds)]
        prompt = _PROMPTS[index % len(_PROMPTS)] * (1 + index % 5)
        body = {"text": prompt, "sampling_params": sampling, "stream": True, "return_logprob": True}
        found.append(Ask(models[index % len(models)], body))
    return found


@dataclass
class Load:
    """Clients that ask the same again and again, and compare each answer with the first."""

    server: Server
    asks: Sequence[Ask]
    answers: int = 0
    problems: list[str] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)
    """Pairs (when it ended, how long it was) of the pauses between two parts of an answer that
    lasted more than a tenth of a second."""

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._expected = [ask.tokens(self.server) for ask in self.asks]
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        threads = [
            threading.Thread(target=self._ask_on, args=pair, daemon=True)
            for pair in zip(self.asks, self._expected, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a stream hangs"

    def _ask_on(self, ask: Ask, expected: list[tuple[int, float]]) -> None:
        while not self._ending.is_set():
            times = [time.monotonic()]
            try:
                got = ask.tokens(self.server, times)
            except (AssertionError, OSError, ValueError) as error:
                with self._lock:
                    self.problems.append(f"{ask}: {type(error).__name__}: {error}")
                return
            pauses = [(b, b - a) for a, b in itertools.pairwise(times) if b - a > 0.1]
            with self._lock:
                self.answers += 1
                self.pauses += pauses
                if [token for token, _ in got] != [token for token, _ in expected]:
                    self.problems.append(f"{ask}: {got} instead of {expected}")
                elif any(abs(a - b) > 1e-3 for (_, a), (_, b) in zip(got, expected, strict=True)):
                    self.problems.append(f"{ask}: log-probabilities {got} instead of {expected}")
