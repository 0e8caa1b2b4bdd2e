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


_FEW = [case for case in check.SWEEP if case.lanes == 4 and case.ffn_ranks != 2]
"""Of every number of attention ranks, the deployments with the fewest and the most FFN ranks."""


@pytest.mark.parametrize("case", slow_but(check.SMALL[:1], check.SMALL), ids=str)
def test_every_state_of_something_small_is_right(case: Any) -> None:
    report = check.verify(case)
    assert report.errors == 0, report.output
    assert report.complete
    assert report.states > 1000


@pytest.mark.slow
def test_part_of_the_states_of_large_deployments_is_right() -> None:
    for case, report in check.sweep(_FEW, seconds=0.3):
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


ALL_FAULTS = {
    **{name: (check.Case(1, 1, 1, 2, 2, 1), changes) for name, changes in FAULTS.items()},
    **{name: (check.CommandCase(1, 2, 3, 1), changes) for name, changes in COMMAND_FAULTS.items()},
    **{name: (check.ReplayCase(1, 1, 2, 2, 1), changes) for name, changes in REPLAY_FAULTS.items()},
}
_FIRST = [next(iter(faults)) for faults in (FAULTS, COMMAND_FAULTS, REPLAY_FAULTS)]


@pytest.mark.parametrize("fault", slow_but(_FIRST, ALL_FAULTS))
def test_a_fault_is_found(fault: str) -> None:
    case, changes = ALL_FAULTS[fault]
    text = case.model.read_text()
    for right, wrong in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    report = check.verify(case, text)
    assert report.errors > 0, report.output
