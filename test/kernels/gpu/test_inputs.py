"""A step's inputs on their way from host memory, and a lease's next step."""

from __future__ import annotations

import pytest
import torch
from crosspool.kernels.triton.inputs import feed, take_inputs
from crosspool.kernels.triton.tables import TensorTable
from support.device_kernels import int32

UNTOUCHED = -7


@pytest.mark.parametrize("head, line, lines", [(40, 5, 3), (1100, 2100, 2)])
def test_what_is_used_of_a_page_table_is_taken(
    head: int, line: int, lines: int, device: torch.device
) -> None:
    source = torch.arange(head + lines * line, dtype=torch.int32)
    source[0], source[1] = lines - 1, line - 2
    if device.type == "cuda":
        source = source.pin_memory()
    table = TensorTable.of([source])
    inputs = torch.full_like(source, UNTOUCHED, device=device)
    take_inputs(table.pointers.to(device), inputs, head, line)
    found = inputs.cpu()
    assert torch.equal(found[:head], source[:head])
    pages, expected = (flat[head:].view(lines, line) for flat in (found, source))
    assert torch.equal(pages[:-1, :-2], expected[:-1, :-2])
    assert (pages[-1] == UNTOUCHED).all()
    assert (pages[:, -2:] == UNTOUCHED).all()


def test_a_lease_feeds_on_what_was_chosen(device: torch.device) -> None:
    chosen, tokens = int32([11, 12, 13], device), int32([1, 2, 3], device)
    positions = int32([40, 0, 7], device)
    sampled = torch.tensor([41, 2**40, 8], device=device)
    feed(chosen, int32([2], device), tokens, positions, sampled)
    assert tokens.tolist() == [11, 12, 3]
    assert positions.tolist() == [41, 1, 7]
    assert sampled.tolist() == [42, 2**40 + 1, 8]
