"""Two devices: what lies where, what crosses, and that the pipeline overlaps."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from support.prompts import sentences
from support.server import DEMO, TINY_MODELS, Server

FFN_KEYS = ("router", "experts.", "shared.", "mlp.")
FFN_RANKS = dict(zip(TINY_MODELS, ([0], [0, 1], [1]), strict=True))
"""FFN ranks of each model, as the server's deployment file has them."""


def config(model: str) -> dict[str, Any]:
    return dict(json.loads((DEMO / model / "config.json").read_text()))


def test_tensors_are_where_the_file_places_them(split_server: Server) -> None:
    tensors = split_server.get("/crosspool/tensors")
    devices = [device["name"] for device in split_server.get("/crosspool/status")["devices"]]
    for model in TINY_MODELS:
        held = {t["rank"]: t["device"] for t in tensors if is_part(t, model, "ffn")}
        assert held == {rank: devices[1 - rank] for rank in FFN_RANKS[model]}
        held = {t["rank"]: t["device"] for t in tensors if is_part(t, model, "attention")}
        assert held == {0: devices[0]}
    for tensor in tensors:
        is_ffn = tensor["key"].startswith(FFN_KEYS)
        assert is_ffn == (tensor["role"] == "ffn"), tensor
        assert tensor["bytes"] > 0
    for model in TINY_MODELS:
        files = (DEMO / model).glob("*.safetensors")
        on_disk = sum(f.stat().st_size for f in files)
        held = sum(t["bytes"] for t in tensors if t["model"] == model)
        # bf16 on disk, fp32 in the pools; headers and padding are a few per cent
        assert 1.9 * on_disk < held < 2.1 * on_disk, (model, held, on_disk)
    placed = {m["name"]: m["ffn_ranks"] for m in split_server.get("/crosspool/status")["models"]}
    assert placed == FFN_RANKS


def is_part(tensor: dict[str, Any], model: str, role: str) -> bool:
    return (tensor["model"], tensor["role"]) == (model, role)


def counters(server: Server) -> list[list[int]]:
    """[FFN rank][rows, dispatch bytes, combine bytes]"""
    links = [link for device in server.get("/crosspool/counters") for link in device["links"]]
    assert len(links) == 2 * 2
    fields = ("rows", "dispatch_bytes", "combine_bytes")
    return [
        [sum(link[field] for link in links if link["ffn_rank"] == rank) for field in fields]
        for rank in (0, 1)
    ]


def test_what_crosses_is_hidden_states_to_the_models_ffn_ranks(split_server: Server) -> None:
    for model in TINY_MODELS:
        shape = config(model)
        before = counters(split_server)
        prompt, new_tokens = list(range(5, 45)), 8
        status, _ = split_server.post(
            f"/m/{model}/generate",
            {
                "input_ids": prompt,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": new_tokens,
                    "ignore_eos": True,
                },
            },
        )
        assert status == 200
        after = counters(split_server)
        layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
        # the last token that was sampled is never fed back
        crossed_rows = len(prompt) + new_tokens - 1
        one_way = layers * hidden * crossed_rows * 4
        for rank in (0, 1):
            crossed = [b - a for a, b in zip(before[rank], after[rank], strict=True)]
            expected = [layers * crossed_rows, one_way, one_way]
            assert crossed == (expected if rank in FFN_RANKS[model] else [0, 0, 0]), (model, rank)


def test_lanes_overlap_and_batches_leave_early(split_server: Server) -> None:
    """Attention of one model runs while the FFN of another does; a batch that has ended is
    replaced while the other goes on."""

    def one(job: tuple[str, str, int]) -> int:
        model, text, tokens = job
        body = {
            "text": text,
            "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True},
        }
        return split_server.post(f"/m/{model}/generate", body)[0]

    texts = sentences(12)
    # one model's batches are large and its steps long; the others' short steps leave earlier
    sizes = (10, 1, 1)
    jobs = [
        (model, text, 240)
        for model, size in zip(TINY_MODELS, sizes, strict=True)
        for text in texts[:size]
    ]
    assert split_server.manage("/crosspool/trace/start")[0] == 200
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert set(pool.map(one, jobs)) == {200}
    status, text = split_server.manage("/crosspool/trace/stop")
    assert status == 200
    events = json.loads(text)
    attention = [e for e in events if e["part"] == "attention"]
    ffn = [e for e in events if e["part"] == "ffn"]
    assert attention and ffn

    overlaps = sum(
        a["model"] != f["model"] and a["start_ns"] < f["end_ns"] and f["start_ns"] < a["end_ns"]
        for a in attention
        for f in ffn
    )
    assert overlaps > 100

    # a lease is one step to the scheduler and many on the lanes: each begins with layer 0
    turns: dict[int, int] = {}
    spans: dict[tuple[int, int], tuple[int, int, int]] = {}
    for event in sorted(
        (e for e in events if e["role"] == "attention"), key=lambda event: event["start_ns"]
    ):
        step = event["step"]
        turns[step] = turns.get(step, 0) + (event["part"] == "attention" and event["layer"] == 0)
        lane, start, end = spans.get(
            (step, turns[step]), (event["lane"], event["start_ns"], event["end_ns"])
        )
        spans[step, turns[step]] = (lane, start, max(end, event["end_ns"]))
    ordered = sorted(spans.values(), key=lambda span: span[1])
    replaced_early = 0
    for lane, _, end in ordered:
        for other_lane, other_start, other_end in ordered:
            # `other` goes on over the end of this one, whose lane is taken meanwhile
            if other_lane != lane and other_start < end < other_end:
                replaced_early += any(
                    next_lane == lane and end <= next_start < other_end
                    for next_lane, next_start, _ in ordered
                )
    assert replaced_early > 10
