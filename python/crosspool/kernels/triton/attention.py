"""Causal attention over the paged cache, for GQA and for absorbed MLA.

Two ways: rows one by one with the keys split among programs (decode), and blocks of rows of one
sequence that share the keys they read (prefill). Slots that a sequence has not written hold
whatever another model left there, NaN included, and are never read into a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosspool.kernels.triton.batch import DeviceBatch


@dataclass(frozen=True)
class AttentionWorkspace:
    """Partial results of decode rows; one serves all layers of a lane, whatever their number."""

    out: torch.Tensor
    """float32 [bucket, q_heads, splits, v_dim]."""
    lse: torch.Tensor
    """float32 [bucket, q_heads, splits]."""

    @classmethod
    def allocate(
        cls, bucket: int, q_heads: int, kv_heads: int, v_dim: int, device: torch.device
    ) -> AttentionWorkspace:
        """Splits enough to keep the device busy with ``bucket`` rows."""
        raise NotImplementedError


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    batch: DeviceBatch,
    layer: torch.Tensor,
    out: torch.Tensor,
    workspace: AttentionWorkspace,
    *,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    mixed: bool,
) -> None:
    """``q`` [bucket, q_heads, qk_dim] against the cached keys of each row's sequence up to its own
    position, whose KV is in ``kv`` [pages, layers, page_size, kv_width] already; writes ``out``
    [bucket, q_heads, v_dim], v_dim <= qk_dim.

    KV head h has its keys at h * qk_dim of a slot. Its values lie behind all keys (GQA:
    kv_width = 2 * kv_heads * qk_dim) or are the first v_dim of the key itself (MLA, absorbed:
    kv_heads = 1, kv_width = qk_dim). ``window``: tokens that a query sees, itself included.

    ``mixed``: False: every row goes the decode way (right for any batch; each reads its keys
    itself). True: sequences with more than one row go the prefill way instead, at the cost of a
    second kernel. A choice of the capture, not of the step."""
    raise NotImplementedError
