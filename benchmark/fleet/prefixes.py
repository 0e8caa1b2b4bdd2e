"""A cached prefix that is asked for after its model has slept: hit rate, time to the first token
and tokens, against those of a model that never sleeps, and of one whose cache was lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmark import checkpoint
from benchmark.client import Answer, replay
from benchmark.fleet.served import Fleet
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, random_prompt

CASES = ("never slept", "slept", "cache lost")
"""Before each request, nothing happens, the model sleeps and is woken, or its cache is given up."""
PREFIX_TOKENS, QUESTION_TOKENS, OUTPUT_TOKENS = 1024, 48, 16
QUESTIONS = 8
"""Requests of a turn that begin with the prefix, after the one by which it is cached."""
_VOCAB = 512


@dataclass
class Result:
    answers: dict[str, list[Answer]] = field(default_factory=lambda: {case: [] for case in CASES})
    """Of each case, to the same requests in the same order."""
    usages: list[Usage] = field(default_factory=list)

    def ttft(self, case: str) -> list[float]:
        """Return the seconds to the first token, from when the model was there."""
        return [answer.ttft for answer in self.answers[case]]

    def hit_rate(self, case: str) -> float:
        """Return the share of prompt tokens that came from the cache."""
        answers = self.answers[case]
        prompts = sum(answer.prompt_tokens for answer in answers)
        return sum(answer.cached_tokens for answer in answers) / prompts

    def differing(self, case: str) -> int:
        """Return the number of outputs that have other tokens than those of the first case."""
        pairs = zip(self.answers[CASES[0]], self.answers[case], strict=True)
        return sum(first.tokens != other.tokens for first, other in pairs)


def _prepare(server: Fleet, name: str, case: str) -> None:
    if case == "slept":
        server.do("sleep", name)
        server.do("wake", name)
    elif case == "cache lost":
        _flush(server, name)


def _flush(server: Fleet, name: str) -> None:
    status, told = server.manage(f"/m/{name}/flush_cache")
    if status != 200:
        raise RuntimeError(f"the cache of {name} cannot be given up: {told}")


def _answer(server: Fleet, name: str, prompt: list[int]) -> Answer:
    (answer,) = replay(server.url, [Request(0.0, name, prompt, OUTPUT_TOKENS)]).answers
    if not answer.complete:
        raise RuntimeError(answer.error or f"status {answer.status}")
    return answer


def run(*, layers: int | None, tiny: bool, rounds: int) -> Result:
    """Take ``rounds`` turns of each case, the first of which does not count."""
    (folder,) = checkpoint.models(1, tiny=tiny, layers=layers)
    result, rng = Result(), np.random.default_rng(0)
    with Fleet([folder], 1) as server, Progress(refresh_per_second=2) as progress:
        (name,) = server.names
        server.pack_all()
        server.do("wake", name)
        for turn in progress.track(range(-1, rounds), description="turns"):
            prefix = random_prompt(PREFIX_TOKENS, _VOCAB, rng)
            prompts = [
                [*prefix, *random_prompt(QUESTION_TOKENS, _VOCAB, rng)]
                for _ in range(QUESTIONS + 1)
            ]
            for case in CASES[:: -1 if turn % 2 else 1]:
                _flush(server, name)
                _answer(server, name, prompts[0])
                with Usage(server) as usage:
                    for prompt in prompts[1:]:
                        _prepare(server, name, case)
                        answer = _answer(server, name, prompt)
                        if turn >= 0:
                            result.answers[case].append(answer)
                if turn >= 0:
                    result.usages.append(usage)
    return result


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_prefixes")
    parameters = parameters | {
        "prefix": PREFIX_TOKENS, "question": QUESTION_TOKENS, "output": OUTPUT_TOKENS,
    }  # fmt: skip
    for case in CASES:
        recorder.add(
            f"ttft {case}", result.ttft(case), "s", model=model, parameters=parameters,
            hit_rate=result.hit_rate(case), answers_that_differ=result.differing(case),
            **total(result.usages),
        )  # fmt: skip
    return recorder


def told(result: Result) -> str:
    return "\n".join(
        f"{case}: {result.hit_rate(case):.1%} of prompt tokens cached, first token after "
        f"{1e3 * quantile(result.ttft(case), 0.5):.1f} ms (P99 "
        f"{1e3 * quantile(result.ttft(case), 0.99):.1f}); {result.differing(case)} of "
        f"{len(result.answers[case])} outputs have other tokens than if it never slept"
        for case in CASES
    )
