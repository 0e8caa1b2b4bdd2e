"""What a server answers to a question: the choices of a response, whether streamed or not, and how
two answers of one question differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 1e-3
"""Largest good difference of two log-probabilities of the same token."""
_DATA = b"data: "
_DONE = b"[DONE]"


class Failed(Exception):
    """The server says that a request has failed; the message holds what it says."""


class Cut(Exception):
    """A response ended before it was whole."""


@dataclass
class Choice:
    """One choice of a response."""

    text: str = ""
    tokens: list[Any] = field(default_factory=list)
    """Sampled tokens, by id or by text, where the response lists them."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of the sampled tokens."""
    prompt_logprobs: list[float] = field(default_factory=list)
    ending: str | None = None
    """Why it ended; None while it has not."""

    def begins(self, other: Choice) -> bool:
        """Return whether ``other`` goes on where this one stands."""
        return (
            other.text.startswith(self.text)
            and other.tokens[: len(self.tokens)] == self.tokens
            and _agree(self.logprobs, other.logprobs[: len(self.logprobs)])
            and (not self.prompt_logprobs or _agree(self.prompt_logprobs, other.prompt_logprobs))
        )


@dataclass
class Answer:
    """The choices of a response, by their index."""

    choices: dict[int, Choice] = field(default_factory=dict)

    def take(self, line: bytes) -> bool:
        """Add a line of a stream. Return whether it carried something. Raises Failed for an error
        within the stream."""
        if not line.startswith(_DATA) or _DONE in line:
            return False
        self.add(json.loads(line[len(_DATA) :]))
        return True

    def add(self, event: Any) -> None:
        """Add an event of a stream, or a whole response. Raises Failed for an error."""
        if isinstance(event, list):  # /generate with n > 1
            for index, part in enumerate(event):
                self._take_generated(index, part)
        elif "error" in event:
            raise Failed(json.dumps(event)[:400])
        elif "meta_info" in event:
            self._take_generated(event.get("index", 0), event)
        else:
            for part in event["choices"]:
                self._append(part)

    @property
    def is_whole(self) -> bool:
        return bool(self.choices) and all(c.ending is not None for c in self.choices.values())

    def difference(self, expected: Answer) -> str | None:
        """Return how this answer differs from the ``expected`` one, but for the values of
        log-probabilities; None where it does not."""
        if self.choices.keys() != expected.choices.keys():
            return f"choices {sorted(self.choices)} instead of {sorted(expected.choices)}"
        for index, choice in self.choices.items():
            other = expected.choices[index]
            for name in ("tokens", "text", "ending"):
                got, wanted = getattr(choice, name), getattr(other, name)
                if got != wanted:
                    return f"choice {index}: {name} {_first_difference(got, wanted)}"
            for name in ("logprobs", "prompt_logprobs"):
                got, wanted = getattr(choice, name), getattr(other, name)
                if len(got) != len(wanted):
                    return f"choice {index}: {len(got)} {name} instead of {len(wanted)}"
        return None

    def logprob_difference(self, expected: Answer) -> float:
        """Return the largest difference between a log-probability of this answer and that of the
        ``expected`` one, which has the same tokens."""
        pairs = (
            pair
            for index, choice in self.choices.items()
            for name in ("logprobs", "prompt_logprobs")
            for pair in zip(
                getattr(choice, name), getattr(expected.choices[index], name), strict=True
            )
        )
        return max((abs(a - b) for a, b in pairs), default=0.0)

    def begins(self, expected: Answer) -> bool:
        """Return whether this answer, which nobody has read to its end, is the beginning of the
        ``expected`` one."""
        return all(
            index in expected.choices and choice.begins(expected.choices[index])
            for index, choice in self.choices.items()
        )

    def _take_generated(self, index: int, part: Any) -> None:
        """Take a part of ``/generate``, which holds everything up to there."""
        meta = part["meta_info"]
        reason = meta["finish_reason"]
        if reason is not None and reason["type"] == "abort":
            raise Failed(json.dumps(reason)[:400])
        sampled = meta.get("output_token_logprobs") or []
        prompt = meta.get("input_token_logprobs") or []
        self.choices[index] = Choice(
            text=part["text"],
            tokens=[token for _, token, _ in sampled],
            logprobs=[value for value, _, _ in sampled],
            prompt_logprobs=[value for value, _, _ in prompt if value is not None],
            ending=None if reason is None else reason["type"],
        )

    def _append(self, part: Any) -> None:
        """Take a part of an OpenAI response, which holds what is new."""
        choice = self.choices.setdefault(part["index"], Choice())
        message = part.get("delta") or part.get("message") or part
        choice.text += message.get("text") or message.get("content") or ""
        listed = part.get("logprobs") or {}
        if "content" in listed:
            choice.tokens += [entry["token"] for entry in listed["content"]]
            choice.logprobs += [entry["logprob"] for entry in listed["content"]]
        elif "tokens" in listed:
            choice.tokens += listed["tokens"]
            choice.logprobs += [value for value in listed["token_logprobs"] if value is not None]
        choice.ending = part.get("finish_reason") or choice.ending


def _agree(some: Sequence[float], others: Sequence[float]) -> bool:
    return len(some) == len(others) and all(
        abs(a - b) <= TOLERANCE for a, b in zip(some, others, strict=True)
    )


def _first_difference(got: Any, wanted: Any) -> str:
    if isinstance(got, list | str) and isinstance(wanted, list | str):
        pairs = zip(got, wanted, strict=False)
        where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
        begin = max(0, where - 2)
        return (
            f"differ from place {where} on, of {len(got)} and {len(wanted)}: "
            f"{got[begin : where + 6]!r} instead of {wanted[begin : where + 6]!r}"
        )
    return f"{got!r} instead of {wanted!r}"
