"""What programs of load are given to compare them, and what recording metrics is timed with."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from benchmark.bench_agrees import CONVERSATIONS, ROWS, Amount, write_conversations
from benchmark.metrics_cost import Traffic, record
from benchmark.server import DEMO, TINY_MODELS


def test_all_programs_are_given_the_same_requests(tmp_path: Path) -> None:
    model = TINY_MODELS[0]
    write_conversations(Amount(requests=7, rate=1.0), model, tmp_path)
    made = json.loads((tmp_path / CONVERSATIONS).read_text())
    rows = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / model)
    turns = [[turn["value"] for turn in one["conversations"]] for one in made]
    assert [row["prompt"] for row in rows] == [prompt for prompt, _ in turns]
    assert [row["output_tokens_count"] for row in rows] == [
        len(tokenizer(output)["input_ids"]) for _, output in turns
    ]
    assert len(rows) == 7


def test_traffic_can_be_recorded_again() -> None:
    traffic = Traffic(seconds=1.0, requests=2, tokens=40, steps=10)
    assert traffic.batch == 4
    assert record(traffic) > 0
