"""Native gated delta nets against the host loop's, with states of several requests in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from crosspool.kernels import native_structs as ns
from crosspool.kernels.attention import RowSpan
from crosspool.kernels.delta_net import DeltaState, DeltaWeights, delta_step, state_cells
from support.native_kernels import NativeKernels

LAYERS, LAYER, PAGES = 3, 1, 400


class Sizes(NamedTuple):
    k_heads: int
    group: int
    k_dim: int
    v_dim: int
    taps: int

    @property
    def width(self) -> int:
        return 2 * self.k_dim + self.group * self.v_dim

    @property
    def rows(self) -> int:
        return self.group * self.k_dim + -(-(self.taps - 1) * self.width // self.v_dim)

    @property
    def shape(self) -> ns.DeltaShape:
        v_heads = self.k_heads * self.group
        return ns.DeltaShape(self.k_heads, v_heads, self.k_dim, self.v_dim, self.taps)


SIZES = [
    Sizes(2, 2, 16, 8, 4),
    Sizes(3, 1, 8, 24, 3),
    Sizes(1, 3, 32, 100, 2),
    Sizes(2, 2, 64, 64, 4),
]


def _weights(sizes: Sizes, dtype: torch.dtype) -> DeltaWeights:
    return DeltaWeights(
        taps=torch.randn(sizes.k_heads, sizes.taps, sizes.width).to(dtype),
        decay=torch.rand(sizes.k_heads, sizes.group) * 0.2,
        decay_bias=torch.randn(sizes.k_heads, sizes.group),
        out_norm=(1 + 0.1 * torch.randn(sizes.v_dim)).to(dtype),
        out_eps=1e-6,
    )


def _cache(sizes: Sizes, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """A cache full of NaN, and the pages that a request's states take in it."""
    kv = torch.full((PAGES, 2, 16, sizes.v_dim * 4), torch.nan, dtype=dtype)
    rows = LAYERS * sizes.k_heads * sizes.rows
    return kv, -(-rows // state_cells(kv, sizes.v_dim).shape[1])


def _places(
    sizes: Sizes, cells: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rows of the layer's state lie: page and row of the page."""
    rows = torch.arange(sizes.k_heads * sizes.rows) + LAYER * sizes.k_heads * sizes.rows
    return state[rows // cells.shape[1]], rows % cells.shape[1]


def _rows(sizes: Sizes, kv: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    cells = state_cells(kv, sizes.v_dim)
    return cells[_places(sizes, cells, state)]


def _reference(
    sizes: Sizes,
    weights: DeltaWeights,
    kv: torch.Tensor,
    segments: Sequence[RowSpan],
    *,
    qkvz: torch.Tensor,
    rates: torch.Tensor,
) -> torch.Tensor:
    cells = state_cells(kv, sizes.v_dim)
    out = torch.empty(len(qkvz), sizes.k_heads * sizes.group * sizes.v_dim, dtype=qkvz.dtype)
    for segment in segments:
        places = _places(sizes, cells, segment.state)
        held = cells[places]
        if segment.start == 0:
            held.zero_()
        state = DeltaState(held, weights=weights, k_dim=sizes.k_dim)
        for row in range(segment.first_row, segment.first_row + segment.rows):
            qkv, gate = qkvz[row].split((sizes.width, qkvz.shape[2] - sizes.width), dim=1)
            rate, decay = rates[row].unbind(1)
            step = delta_step(weights, state, qkv, gate, rate=rate, decay=decay)
            out[row] = step.flatten()
        cells[places] = state.rows
    return out


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("eight_bits", [False, True])
@torch.inference_mode()
def test_steps_equal_the_reference(
    native: NativeKernels, dtype: torch.dtype, sizes: Sizes, eight_bits: bool
) -> None:
    torch.manual_seed(5)
    weights = _weights(sizes, dtype)
    kv, pages = _cache(sizes, torch.float8_e4m3fn if eight_bits else dtype)
    expected_kv = kv.clone()
    order = torch.randperm(PAGES)[: 2 * pages].view(2, pages)
    done = [0, 0]
    none = torch.empty(0, dtype=torch.int64)
    for chunks in ([(0, 11)], [(0, 1), (1, 2)], [(1, 17), (0, 1)], [(0, 1), (1, 1)]):
        segments, rows = [], 0
        for request, count in chunks:
            segments.append(RowSpan(rows, count, done[request], none, order[request]))
            rows += count
            done[request] += count
        qkvz = torch.randn(rows, sizes.k_heads, sizes.width + sizes.group * sizes.v_dim).to(dtype)
        rates = torch.randn(rows, sizes.k_heads, 2, sizes.group).to(dtype)
        expected = _reference(sizes, weights, expected_kv, segments, qkvz=qkvz, rates=rates)
        found = native.delta_net(
            sizes.shape,
            weights,
            kv,
            LAYER,
            segments,
            qkvz=qkvz.float(),
            rates=rates.float(),
        )
        close = 0.05 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        assert expected.float().std() > 0.1  # else the tolerance would say nothing
    for state in order:
        ours, theirs = (
            DeltaState(_rows(sizes, cache, state), weights=weights, k_dim=sizes.k_dim)
            for cache in (kv, expected_kv)
        )
        torch.testing.assert_close(ours.matrices, theirs.matrices, rtol=close, atol=0.1 * close)
        torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=0, atol=0)


@torch.inference_mode()
def test_a_row_has_the_same_bits_in_a_chunk_of_any_length(
    native: NativeKernels, whole: NativeKernels, dtype: torch.dtype
) -> None:
    sizes, tokens = SIZES[0], 23
    weights = _weights(sizes, dtype)
    qkvz = torch.randn(tokens, sizes.k_heads, sizes.width + sizes.group * sizes.v_dim).to(dtype)
    rates = torch.randn(tokens, sizes.k_heads, 2, sizes.group).to(dtype)
    kv, pages = _cache(sizes, dtype)
    state = torch.arange(pages)
    none = torch.empty(0, dtype=torch.int64)
    results = []
    for kernels, size in ((native, tokens), (whole, 1), (native, 7)):
        kv.fill_(torch.nan)
        found = []
        for first in range(0, tokens, size):
            part = slice(first, first + size)
            span = RowSpan(0, len(qkvz[part]), first, none, state)
            found.append(
                kernels.delta_net(
                    sizes.shape,
                    weights,
                    kv,
                    LAYER,
                    [span],
                    qkvz=qkvz[part].to(torch.float32, copy=True),
                    rates=rates[part].to(torch.float32, copy=True),
                )
            )
        results.append((torch.cat(found), state_cells(kv, sizes.v_dim)[state].clone()))
    for out, cells in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(cells.nan_to_num(), results[0][1].nan_to_num())


@torch.inference_mode()
def test_gates_of_heads(native: NativeKernels, dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, 20).to(dtype)
    both = torch.randn(5, 3, 40).to(dtype).float()
    expected = (x.float() * torch.sigmoid(both[..., 20:])).to(dtype)
    native.gate_heads(x, both[..., 20:])
    torch.testing.assert_close(
        x, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
