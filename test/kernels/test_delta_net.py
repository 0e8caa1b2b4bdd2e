"""The gated delta net against transformers' form for whole chunks, and its state in pages."""

from __future__ import annotations

import torch
from crosspool.kernels.delta_net import DeltaState, DeltaWeights, delta_step, state_cells
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

K_HEADS, GROUP, K_DIM, V_DIM, TAPS, TOKENS = 2, 3, 16, 24, 4, 150
WIDTH = 2 * K_DIM + GROUP * V_DIM
ROWS = GROUP * K_DIM + -(-(TAPS - 1) * WIDTH // V_DIM)


@torch.inference_mode()
def test_steps_equal_the_form_for_chunks() -> None:
    torch.manual_seed(3)
    weights = DeltaWeights(
        taps=torch.randn(K_HEADS, TAPS, WIDTH),
        decay=torch.rand(K_HEADS, GROUP) * 0.2,
        decay_bias=torch.randn(K_HEADS, GROUP),
        out_norm=1 + 0.1 * torch.randn(V_DIM),
        out_eps=1e-6,
    )
    qkv = torch.randn(TOKENS, K_HEADS, WIDTH)
    gate = torch.randn(TOKENS, K_HEADS, GROUP * V_DIM)
    rate, decay = torch.randn(2, TOKENS, K_HEADS, GROUP)
    state = DeltaState(torch.zeros(K_HEADS * ROWS, V_DIM), weights=weights, k_dim=K_DIM)
    found = torch.stack(
        [
            delta_step(weights, state, qkv[t], gate[t], rate=rate[t], decay=decay[t])
            for t in range(TOKENS)
        ]
    )

    channels = qkv.flatten(1).t()[None].double()  # [1, channels, tokens]
    taps = weights.taps.transpose(1, 2).reshape(-1, 1, TAPS).double()
    mixed = torch.nn.functional.conv1d(channels, taps, padding=TAPS - 1, groups=len(taps))
    mixed = torch.nn.functional.silu(mixed[0, :, :TOKENS]).t().view(TOKENS, K_HEADS, WIDTH)
    q, k, v = mixed.float().split((K_DIM, K_DIM, GROUP * V_DIM), dim=2)
    log_decay = -weights.decay * torch.nn.functional.softplus(decay + weights.decay_bias)
    read, last = torch_chunk_gated_delta_rule(
        q.repeat_interleave(GROUP, dim=1)[None],
        k.repeat_interleave(GROUP, dim=1)[None],
        v.reshape(1, TOKENS, -1, V_DIM),
        log_decay.flatten(1)[None],
        rate.sigmoid().flatten(1)[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    read = read[0].view(TOKENS, K_HEADS, GROUP, V_DIM)
    scale = torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-6) * weights.out_norm
    expected = read * scale * torch.nn.functional.silu(gate).view_as(read)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.matrices.flatten(0, 1), last[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.inputs, qkv[-(TAPS - 1) :].transpose(0, 1), atol=0, rtol=0)


def test_cells_of_pages_are_floats_in_their_bytes() -> None:
    kv = torch.zeros(5, 3, 4, 10, dtype=torch.bfloat16)  # 60 floats a page
    cells = state_cells(kv, 8)
    assert cells.shape == (5, 7, 8) and cells.dtype == torch.float32
    cells[2] = torch.arange(56.0).view(7, 8)
    page = kv[2].contiguous().view(torch.uint8).flatten()
    assert torch.equal(page[: 56 * 4].view(torch.float32), torch.arange(56.0))
    assert not page[56 * 4 :].any() and not kv[[0, 1, 3, 4]].any()
