"""The ring of lane events and its Chrome form."""

import json

from crosspool.observability.trace import LaneTrace, to_chrome


def record(trace, layer, role="ffn", part="ffn", lane=0):
    trace.record(
        role=role,
        rank=0,
        attention_rank=0,
        lane=lane,
        step=4,
        model=1,
        layer=layer,
        part=part,
        rows=2,
        start_ns=trace.now(),
    )


def test_records_only_between_start_and_stop():
    trace = LaneTrace()
    record(trace, 0)
    trace.start()
    record(trace, 1)
    record(trace, 2)
    events = trace.stop()
    record(trace, 3)
    assert [e.layer for e in events] == [1, 2]
    assert all(0 < e.start_ns <= e.end_ns for e in events)
    assert trace.stop() == []


def test_a_part_that_began_before_tracing_is_left_out():
    trace = LaneTrace()
    began = trace.now()
    trace.start()
    trace.record(
        role="ffn", rank=0, attention_rank=0, lane=0, step=-1, model=0, layer=0, part="ffn",
        rows=1, start_ns=began,
    )  # fmt: skip
    assert trace.stop() == []


def test_the_ring_keeps_the_newest():
    trace = LaneTrace(capacity=3)
    trace.start()
    for layer in range(10):
        record(trace, layer)
    assert [e.layer for e in trace.stop()] == [7, 8, 9]


def test_chrome_form():
    trace = LaneTrace()
    trace.start()
    record(trace, 0, role="attention", part="attention", lane=1)
    record(trace, 0)
    record(trace, -1, role="attention", part="lm_head", lane=1)
    document = json.loads(json.dumps(to_chrome(trace.stop(), {0: "a", 1: "b"})))
    spans = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert [s["name"] for s in spans] == ["b: attention 0", "b: ffn 0", "b: LM head"]
    assert spans[0]["pid"] == spans[2]["pid"] != spans[1]["pid"]
    assert all(s["dur"] >= 0 for s in spans)
    names = {e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M"}
    assert {"attention rank 0", "ffn rank 0", "lane 1 of attention rank 0"} <= names
