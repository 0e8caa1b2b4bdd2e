"""Streams of a server whose processes die meanwhile, and what each answered."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import ge
from typing import Any
from weakref import WeakKeyDictionary

from support.server import Server

_PATIENCE = 120.0
"""Seconds."""
_PROMPTS = ("The import statement", "A list of", "x", "While the module is")


Answer = list[tuple[int, float]]
"""Pairs (token, log-probability)."""


@dataclass(frozen=True)
class Ask:
    """A request for one model, streamed."""

    model: str
    body: Any

    def tokens(self, server: Server, heard: Callable[[], None] = lambda: None) -> Answer:
        """The whole answer; calls ``heard`` at each part of it. Raises AssertionError or OSError
        when the request fails."""
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
                heard()
                last = json.loads(word)
                assert "error" not in last, last
        info = last["meta_info"]
        assert info["finish_reason"]["type"] in ("length", "stop"), info
        assert info["completion_tokens"] == len(info["output_token_logprobs"])
        return [(token, logprob) for logprob, token, _ in info["output_token_logprobs"]]


def asks(models: Sequence[str], count: int, new_tokens: int = 60) -> list[Ask]:
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


_alone: WeakKeyDictionary[Server, dict[str, Answer]] = WeakKeyDictionary()


def alone(server: Server, ask: Ask) -> Answer:
    """What ``server`` answers when it has no other request; it is asked only the first time."""
    answers = _alone.setdefault(server, {})
    key = json.dumps([ask.model, ask.body])
    if key not in answers:
        answers[key] = ask.tokens(server)
    return answers[key]


class Load:
    """Clients that ask the same again and again, and compare each answer with the one that the
    server gave when it had no other request."""

    def __init__(self, server: Server, asks: Sequence[Ask]) -> None:
        self.asks = asks
        self.answers = 0
        self.problems: list[str] = []
        self._server = server
        self._expected = [alone(server, ask) for ask in asks]
        self._ending = threading.Event()
        self._news = threading.Condition()
        self._parts = [0] * len(asks)
        """How many parts of answers each client has got."""

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        threads = [
            threading.Thread(target=self._ask_on, args=(client,), daemon=True)
            for client in range(len(self.asks))
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(_PATIENCE)
        assert not any(thread.is_alive() for thread in threads), "a stream hangs"

    def flow(self, parts: int = 20) -> None:
        """Returns once every client has got so many further parts: it most likely is in the midst
        of an answer, however fast the machine is."""
        with self._news:
            awaited = [had + parts for had in self._parts]
            self._wait(lambda: all(map(ge, self._parts, awaited)))

    def answer_all(self) -> None:
        """Returns once there are as many further answers as clients."""
        with self._news:
            awaited = self.answers + len(self.asks)
            self._wait(lambda: self.answers >= awaited)

    def _wait(self, done: Callable[[], bool]) -> None:
        came = self._news.wait_for(lambda: self.problems or done(), _PATIENCE)
        assert not self.problems, self.problems[0]
        assert came, f"nothing came: {self._parts} parts of {self.answers} answers"

    def _hear(self, client: int) -> None:
        with self._news:
            self._parts[client] += 1
            self._news.notify_all()

    def _ask_on(self, client: int) -> None:
        ask, expected = self.asks[client], self._expected[client]
        while not self._ending.is_set():
            problem = None
            try:
                got = ask.tokens(self._server, partial(self._hear, client))
            except (AssertionError, OSError, ValueError) as error:
                problem = f"{ask}: {type(error).__name__}: {error}"
            else:
                if [token for token, _ in got] != [token for token, _ in expected]:
                    problem = f"{ask}: {got} instead of {expected}"
                elif any(abs(a - b) > 1e-3 for (_, a), (_, b) in zip(got, expected, strict=True)):
                    problem = f"{ask}: log-probabilities {got} instead of {expected}"
            with self._news:
                if problem is None:
                    self.answers += 1
                else:
                    self.problems.append(problem)
                self._news.notify_all()
            if problem is not None:
                return
