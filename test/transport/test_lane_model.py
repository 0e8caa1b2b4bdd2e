"""The models of the lanes, of the command ring and of replay under spin, and that the search finds
faults that are put into them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.marks import slow_but

_CHECK = Path(__file__).parents[2] / "sgl-kernel-ext" / "model" / "check.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lane_model_check", _CHECK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = _load()
pytestmark = pytest.mark.skipif(
    not check.available(), reason="spin or a C compiler is not installed"
)


@pytest.mark.parametrize("case", slow_but(check.EXHAUSTIVE[:1], check.EXHAUSTIVE), ids=str)
def test_every_state_of_a_small_deployment_is_right(case: Any) -> None:
    report = check.verify(case, check.MODEL.read_text())
    assert report.errors == 0, report.output
    assert report.complete
    assert report.states > 1000


@pytest.mark.slow
def test_part_of_the_states_of_every_deployment_is_right() -> None:
    for case, report in check.sweep(check.MODEL.read_text(), seconds=0.5):
        assert report.errors == 0, f"{case}\n{report.output}"
        assert report.states > 1000


FAULTS = {
    "the signal is stored before the payload": (
        "               dispatch_payload[i] = TAG(epoch, step[lane], layer[lane]);\n"
        "               dispatched[i] = sequence[i]\n",
        "               dispatched[i] = sequence[i];\n"
        "               dispatch_payload[i] = TAG(epoch, step[lane], layer[lane])\n",
    ),
    "a new rank does not ring its peers": (
        "  for (a : 0 .. ATTENTION_RANKS - 1) { attention_bell[a] = true }\n",
        "",
    ),
    "a reply does not ring": ("            attention_bell[a] = true\n", "            skip\n"),
    "the bell is rung before the signal is stored": (
        "dispatched[i] = sequence[i];\n            MAY_DIE;\n            ffn_bell[f] = true",
        "ffn_bell[f] = true;\n            MAY_DIE;\n            dispatched[i] = sequence[i]",
    ),
    "a new attention rank does not wait for its predecessor's answer": (
        "ready = ready && dispatched[LINK(a, lane, f)] == combined[LINK(a, lane, f)]",
        "skip",
    ),
    "a new FFN rank forgets what had its reply": (
        "replied[LINK(a, lane, f)] = combined[LINK(a, lane, f)]",
        "skip",
    ),
    "a dispatch is not sent again to new memory": (
        "dispatched[i] = sequence[i]\n            :: else",
        "skip\n            :: else",
    ),
}


@pytest.mark.parametrize("fault", slow_but([*FAULTS][:1], FAULTS))
def test_a_fault_is_found(fault: str) -> None:
    right, wrong = FAULTS[fault]
    text = check.MODEL.read_text()
    assert text.count(right) == 1
    report = check.verify(check.Case(1, 1, 1, 2, 2, 1), text.replace(right, wrong))
    assert report.errors > 0, report.output


@pytest.mark.parametrize("case", slow_but(check.COMMANDS[:1], check.COMMANDS), ids=str)
def test_every_state_of_a_host_and_its_loop_is_right(case: Any) -> None:
    report = check.verify(case, check.COMMANDS_MODEL.read_text())
    assert report.errors == 0, report.output
    assert report.complete
    assert report.states > 1000


COMMAND_FAULTS = {
    "the host empties the eventfd after it looked": (
        "     atomic { signalled -> signalled = false }\n     do\n",
        "     signalled;\n     do\n",
        "     :: else -> break\n     od\n  od;\n",
        "     :: else -> break\n     od;\n     signalled = false\n  od;\n",
    ),
    "the bell is looked at after the commands": (
        "     bell = false;\n     do\n",
        "     do\n",
        "     :: else -> break\n     od;\n     skip;\n     /* Steps begin",
        "     :: else -> break\n     od;\n     bell = false;\n     /* Steps begin",
    ),
    "a slot is filled after it is counted": (
        "    assert(event_head - event_tail < EVENTS);     \\\n",
        "    event_head++;                                 \\\n",
        "  event_head++;                                   \\\n  signalled",
        "  signalled",
    ),
    "leases leave no room for the ends of steps": (
        "> RESERVE;",
        "> 0;",
    ),
    "a recall does not reach a lease that waits for a lane": (
        ":: i < queued && queue[i] == s -> lease[s] = done[s] + 1",
        ":: false -> skip",
    ),
}


@pytest.mark.parametrize("fault", slow_but([*COMMAND_FAULTS][:1], COMMAND_FAULTS))
def test_a_fault_of_the_rings_is_found(fault: str) -> None:
    text = check.COMMANDS_MODEL.read_text()
    changes = COMMAND_FAULTS[fault]
    for right, wrong in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    report = check.verify(check.COMMANDS[0], text)
    assert report.errors > 0, report.output


@pytest.mark.parametrize("case", slow_but(check.REPLAYS[:1], check.REPLAYS), ids=str)
def test_every_state_of_a_scheduler_and_its_ranks_is_right(case: Any) -> None:
    report = check.verify(case, check.REPLAY_MODEL.read_text())
    assert report.errors == 0, report.output
    assert report.complete
    assert report.states > 1000


REPLAY_FAULTS = {
    "late results of a dead process count": (
        "        :: i < incarnation[a] /* the process is gone */\n",
        "        :: i < incarnation[a] && kind == ready\n",
        "        :: i == incarnation[a] && kind == result ->\n",
        "        :: kind == result ->\n",
        "           :: flight[request] == step ->\n",
        "           :: flight[request] != 0 ->\n",
    ),
    "late news of a death make its successor go away": (
        "        :: i >= incarnation[a] -> goto lose\n",
        "        :: true -> goto lose\n",
    ),
    "a successor that reports first is taken for its predecessor": (
        "              i = i - 1;\n              goto lose\n",
        "              incarnation[a] = i;\n              away[a] = false\n",
    ),
    "steps in flight are not taken back": (
        "            flight[r] = 0;\n            place[r] = NOWHERE\n",
        "            place[r] = NOWHERE\n",
    ),
    "a request goes on where nothing is known of it": (
        "            flight[r] = 0;\n            place[r] = NOWHERE\n",
        "            flight[r] = 0\n",
    ),
}


@pytest.mark.parametrize("fault", slow_but([*REPLAY_FAULTS][:1], REPLAY_FAULTS))
def test_a_fault_of_replay_is_found(fault: str) -> None:
    text = check.REPLAY_MODEL.read_text()
    changes = REPLAY_FAULTS[fault]
    for right, wrong in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    reports = [check.verify(case, text) for case in check.REPLAYS[:3]]
    assert any(report.errors for report in reports), reports[-1].output
