"""The link within one device: references instead of copies, the same rules, the same counters."""

import subprocess
import sys

import pytest
import torch
from crosspool.transport.data_path import DispatchHeader, LaneError, LocalLink


def test_tensors_pass_by_reference_and_are_counted():
    link = LocalLink(attention_rank=1, lane=0, ffn_rank=2)
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    assert link.poll() is None
    header = DispatchHeader(epoch=0, model=1, layer=4, rows=3)
    link.dispatch(header, hidden)
    assert link.poll() == link.poll() == header
    assert link.hidden(torch.bfloat16) is hidden
    assert not link.ready()
    partial = hidden * 2
    link.reply(partial)
    assert link.poll() is None
    assert link.ready()
    assert link.combine((3, 8), torch.bfloat16) is partial
    assert not link.ready()
    link.dispatch(header, hidden)
    counters = link.counters
    assert (counters.dispatches, counters.rows) == (2, 6)
    assert (counters.dispatch_bytes, counters.combine_bytes) == (2 * 3 * 8 * 2, 3 * 8 * 2)


def test_the_protocol_is_kept():
    link = LocalLink(0, 0, 0)
    hidden = torch.zeros(2, 4)
    header = DispatchHeader(0, 0, 0, 2)
    for premature in (
        lambda: link.combine((2, 4), torch.float32),
        lambda: link.hidden(torch.float32),
        lambda: link.reply(hidden),
        lambda: link.dispatch(header, torch.zeros(3, 4)),
    ):
        with pytest.raises(LaneError):
            premature()
    link.dispatch(header, hidden)
    with pytest.raises(LaneError, match="outstanding"):
        link.dispatch(header, hidden)
    with pytest.raises(LaneError, match="not torch"):
        link.hidden(torch.bfloat16)
    for wrong in (torch.zeros(1, 4), torch.zeros(2, 4, dtype=torch.bfloat16)):
        with pytest.raises(LaneError, match="does not fit"):
            link.reply(wrong)
    link.reply(hidden)
    with pytest.raises(LaneError, match="outstanding"):
        link.dispatch(header, hidden)
    with pytest.raises(LaneError, match="no dispatch to reply to"):
        link.reply(hidden)
    with pytest.raises(LaneError, match="the partial sum is"):
        link.combine((2, 5), torch.float32)
    assert link.combine((2, 4), torch.float32) is hidden


def test_the_interface_imports_no_torch():
    """The launcher makes the segment, the scheduler the page tables; neither needs torch."""
    script = (
        "import sys, crosspool.transport.shared_memory, crosspool.kvpool.allocator;"
        "import crosspool.kvpool.virtualizer; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
