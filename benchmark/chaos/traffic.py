"""Clients that ask the same questions again and again, and note what came of each."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmark.chaos.answers import TOLERANCE, Answer, Cut, Failed

TIMEOUT = 120.0
"""Seconds after which a request counts as failed."""
NOTED = 0.05
"""Seconds from which a pause is noted down."""
_PROMPTS = (
    "The import statement",
    "def f(x):",
    "While the module is loaded, names are bound in the order",
    "中文 🦊 class",
)
_LONG = "A module can contain executable statements as well as function definitions. " * 12
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "size": {"type": "integer"}},
    "required": ["name", "size"],
}


@dataclass(frozen=True)
class Question:
    """A request whose answer is always the same."""

    name: str
    path: str
    body: dict[str, Any]

    def __str__(self) -> str:
        model = self.body.get("model", "")
        return f"{self.name} of {self.path} {model}".rstrip()

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(frozen=True)
class Outcome:
    """What came of a request. Times are of the monotonic clock."""

    question: Question
    sent: float
    done: float
    kind: str
    """``ok``, ``left`` by its client, ``cut``, ``failed``, ``wrong``, or ``inexact`` where the
    log-probabilities alone are wrong."""
    note: str
    pauses: tuple[tuple[float, float], ...]
    """When each pause that was noted began, and when it ended."""
    logprob_difference: float = 0.0
    """The largest of any token; 0 where the answer is not whole or has other tokens."""


def questions(models: Sequence[str], tokens: int) -> list[Question]:
    """Return questions of every kind for each of ``models``: greedy, drawn with a seed, with
    penalties, under grammars, with stop strings, several choices, long prompts, log-probabilities.
    A long answer has ``tokens`` tokens."""
    found = []
    for place, model in enumerate(models):
        prompt = _PROMPTS[place % len(_PROMPTS)]
        long = {"max_new_tokens": tokens, "ignore_eos": True}
        drawn = {"temperature": 0.9, "sampling_seed": 100 + place, "top_k": 50}
        generated: dict[str, dict[str, Any]] = {
            "greedy": {"sampling_params": {**long, "temperature": 0}},
            "drawn": {"sampling_params": {**long, **drawn}},
            "penalties": {"sampling_params": {**long, **drawn, "frequency_penalty": 0.3}},
            "regex": {"sampling_params": {**long, **drawn, "regex": "[a-z ]{60,200}"}},
            "long prompt": {
                "text": _LONG + prompt,
                "logprob_start_len": 0,
                "sampling_params": {**long, **drawn, "max_new_tokens": tokens // 3},
            },
        }
        for name, more in generated.items():
            body = {"text": prompt, "stream": True, "return_logprob": True, **more}
            found.append(Question(name, f"/m/{model}/generate", body))
        base = {"model": model, "max_tokens": tokens, "temperature": 0.8, "seed": 7 + place}
        chat = {**base, "messages": [{"role": "user", "content": prompt}]}
        text = {**base, "prompt": prompt, "ignore_eos": True}
        schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}
        found += [
            Question("stop", "/v1/completions", {**text, "stream": True, "stop": ["self.", "()"]}),
            Question("choices", "/v1/completions", {**text, "n": 2, "logprobs": 2}),
            Question("deltas", "/v1/completions", {**text, "stream": True, "logprobs": 1}),
            Question(
                "chat",
                "/v1/chat/completions",
                # A chat stream leaves out log-probabilities of tokens without text, or does not, by
                # how many tokens a part has.
                {**chat, "stream": True, "ignore_eos": True},
            ),
            Question("schema", "/v1/chat/completions", {**chat, "response_format": schema}),
        ]
    return found


@dataclass
class Traffic:
    """Asks ``questions`` of the server at ``url``, ``clients`` at a time, each in an order that
    ``seed`` decides. ``left_share``: share of the streams that their client leaves before they
    end."""

    url: str
    questions: Sequence[Question]
    clients: int
    seed: int
    left_share: float = 0.1
    outcomes: list[Outcome] = field(default_factory=list)
    _expected: dict[int, Answer] = field(default_factory=dict)
    _ending: bool = False

    async def learn(self) -> None:
        """Ask every question once, alone. Raises Failed or Cut where the server cannot answer, and
        RuntimeError where an answer is empty."""
        async with self._session() as session:
            for index, question in enumerate(self.questions):
                answer = Answer()
                await _ask(session, question, answer, [], None)
                if not any(choice.text for choice in answer.choices.values()):
                    raise RuntimeError(f"{question} has an empty answer")
                self._expected[index] = answer

    async def run(self) -> None:
        """Ask until :meth:`end` is called; return when every answer is there."""
        self._ending = False
        async with self._session() as session:
            await asyncio.gather(*(self._client(session, n) for n in range(self.clients)))

    def end(self) -> None:
        self._ending = True

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT),
            read_bufsize=1 << 20,
        )

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self._ending:
            index = rng.randrange(len(self.questions))
            leaves = rng.randrange(1, 60) if rng.random() < self.left_share else None
            outcome = await self._outcome(session, index, leaves)
            self.outcomes.append(outcome)
            if outcome.kind in ("cut", "failed"):
                await asyncio.sleep(0.1)

    async def _outcome(
        self, session: aiohttp.ClientSession, index: int, leaves: int | None
    ) -> Outcome:
        question, expected = self.questions[index], self._expected[index]
        answer, times = Answer(), [time.monotonic()]
        kind, note, inexactness = "ok", "", 0.0
        try:
            whole = await _ask(session, question, answer, times, leaves)
            if not whole:
                kind = "left"
            difference = answer.difference(expected) if whole else None
            if not whole and not answer.begins(expected):
                difference = f"begins otherwise: {str(answer)[:400]}"
            if difference is not None:
                kind, note = "wrong", difference
            elif whole:
                inexactness = answer.logprob_difference(expected)
                if inexactness > TOLERANCE:
                    kind, note = "inexact", f"a log-probability is off by {inexactness:g}"
        except (Cut, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            kind, note = "cut", f"{type(error).__name__}: {error}"
        except TimeoutError:
            kind, note = "failed", f"no answer within {TIMEOUT:g} s"
        except (Failed, aiohttp.ClientError, ValueError) as error:
            kind, note = "failed", f"{type(error).__name__}: {error}"
        done = time.monotonic()
        ends = [*times[1:], done]
        pauses = tuple(p for p in zip(times, ends, strict=True) if p[1] - p[0] >= NOTED)
        noted = pauses if question.streams else ()
        return Outcome(question, times[0], done, kind, note, noted, inexactness)


async def _ask(
    session: aiohttp.ClientSession,
    question: Question,
    answer: Answer,
    times: list[float],
    leaves: int | None,
) -> bool:
    """Fill in ``answer``, and when each part of it came. Return whether it is whole: a client that
    ``leaves`` after so many parts of a stream does not wait for the others. Raises Failed or Cut,
    and what aiohttp raises."""
    async with session.post(question.path, json=question.body) as response:
        if response.status != 200:
            raise Failed(f"{response.status} {(await response.text())[:400]}")
        if not question.streams:
            answer.add(await response.json())
            return True
        parts, done = 0, False
        async for line in response.content:
            done = done or b"[DONE]" in line
            if answer.take(line):
                times.append(time.monotonic())
                parts += 1
                if parts == leaves:
                    response.close()
                    return answer.is_whole and done
        if not done or not answer.is_whole:
            raise Cut(f"the stream ended after {parts} parts")
        return True
