"""Multi-head latent attention's rows before and after attention, in the absorbed form."""

from __future__ import annotations

import torch

from crosspool.kernels.triton.batch import DeviceBatch, RopeTable
from crosspool.kernels.triton.tables import TensorTable


def mla_append(
    compressed: torch.Tensor,
    norm: TensorTable,
    batch: DeviceBatch,
    layer: torch.Tensor,
    rope: RopeTable,
    kv: torch.Tensor,
    *,
    eps: float,
) -> None:
    """What the cache keeps of each row: the normed latent, then the rotated rope key.

    ``compressed`` [bucket, latent + rope.dim], rows at any stride; ``norm`` table of [latent];
    writes the rows' slots of ``kv`` [pages, layers, page_size, latent + rope.dim]."""
    raise NotImplementedError


def mla_queries(
    plain: torch.Tensor,
    kv_b: TensorTable,
    batch: DeviceBatch,
    layer: torch.Tensor,
    rope: RopeTable,
    q: torch.Tensor,
    *,
    nope: int,
) -> None:
    """Absorbed queries: q[:, h] = (plain[:, h, :nope] K_h, rotated plain[:, h, nope:]).

    ``plain`` [bucket, heads, nope + rope.dim]; ``kv_b`` table of [heads * (nope + v), latent], the
    checkpoint's ``kv_b_proj``, of which K_h is head h's first ``nope`` rows; ``q``
    [bucket, heads, latent + rope.dim]."""
    raise NotImplementedError


def mla_values(
    attended: torch.Tensor,
    kv_b: TensorTable,
    batch: DeviceBatch,
    layer: torch.Tensor,
    out: torch.Tensor,
    *,
    nope: int,
) -> None:
    """out[:, h] = attended[:, h] V_h^T: ``attended`` [bucket, heads, latent], ``out``
    [bucket, heads, v], V_h the rows of head h in ``kv_b`` that follow its K_h."""
    raise NotImplementedError
