"""The FFN part's kernels: gated MLP, router, experts."""

from __future__ import annotations

from typing import Literal

import torch

from crosspool.kernels.linear import linear
from crosspool.kernels.norm import sigmoid

_ALPHA = 1.702
"""Factor of the clamped SwiGLU's sigmoid."""


def gated_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    swiglu_limit: float | None = None,
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): ``x`` [T, H], ``gate_up`` [2I, H] with the gate first, ``down``
    [H, I]; returns [T, H]. ``gate_up_bias`` [2I] and ``down_bias`` [H]: those of the projections.
    ``swiglu_limit``: see :attr:`crosspool.models.spec.MoEFFN.swiglu_limit`."""
    gate, up = linear(x, gate_up, gate_up_bias).chunk(2, dim=-1)
    if swiglu_limit is None:
        return linear((gate * sigmoid(gate)).to(x.dtype) * up, down, down_bias)
    gate, up = gate.clamp(max=swiglu_limit).float(), up.clamp(-swiglu_limit, swiglu_limit).float()
    activation = (up + 1.0) * (gate * sigmoid(gate * _ALPHA))
    return linear(activation.to(x.dtype), down, down_bias)


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    logit_bias: torch.Tensor | None = None,
    score: Literal["softmax", "sigmoid", "sparsemixer"],
    top_k: int,
    groups: int,
    top_groups: int,
    group_score: Literal["max", "top2_sum"],
    renormalize: bool,
    scale: float,
    jitter: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of every row of ``x`` [T, H]. Returns them and their weights, int64 and
    float32 [T, top_k].

    The product runs in the dtype of ``weight`` [experts, H]. ``bias`` float32 [experts] changes the
    choice, not the weights; ``logit_bias`` [experts] is that of the product. The other rules are
    those of :class:`crosspool.models.spec.RouterSpec`."""
    logits = linear(x.to(weight.dtype), weight, logit_bias).float()
    if score == "sparsemixer":
        return _mix_sparsely(logits, top_k, jitter)
    scores = logits.softmax(dim=-1) if score == "softmax" else sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if score == "sigmoid" and bias is None and groups == 1:
        choice = logits  # in the same order, and far from zero they differ where scores do not
    if groups > 1:
        choice = _limit_groups(choice, groups, top_groups, group_score)
    experts = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if renormalize:
        # All chosen sigmoids may be zero; the largest values of a softmax cannot.
        tiny = 1e-20 if score == "sigmoid" else 0.0
        weights = weights / (weights.sum(dim=-1, keepdim=True) + tiny)
    return experts, weights * scale


def _mix_sparsely(
    logits: torch.Tensor, top_k: int, jitter: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses experts one after another by ``logits`` float32 [T, experts]; the weight of one is
    its softmax over those of the experts left whose logits are close to its own."""
    experts, weights, left = [], [], logits
    for _ in range(top_k):
        most, expert = left.max(dim=-1, keepdim=True)
        far = (most - logits) / logits.abs().maximum(most) > 2 * jitter
        close = left.masked_fill(far, float("-inf"))
        experts.append(expert)
        weights.append(close.softmax(dim=-1).gather(1, expert))
        left = left.scatter(1, expert, float("-inf"))
    return torch.cat(experts, dim=1), torch.cat(weights, dim=1)


def shared_weights(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Returns the weight of the shared expert for every row of ``x`` [T, H], float32 [T, 1]: the
    sigmoid of the product with ``gate`` [1, H], which runs in the dtype of the gate."""
    return sigmoid(linear(x.to(gate.dtype), gate))


def _limit_groups(
    choice: torch.Tensor, groups: int, top_groups: int, group_score: Literal["max", "top2_sum"]
) -> torch.Tensor:
    """Returns ``choice`` [T, experts] with -inf for every expert outside a row's best groups."""
    grouped = choice.reshape(len(choice), groups, choice.shape[1] // groups)
    if group_score == "max":
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(top_groups, dim=-1).indices
    barred = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(barred[..., None], float("-inf")).flatten(1)


def moe_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    *,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    first_expert: int,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    swiglu_limit: float | None = None,
    weighs_input: bool = False,
) -> torch.Tensor:
    """Weighted sum of the chosen experts that are held here: float32 [T, H].

    ``x`` [T, H]; ``experts`` and ``weights`` [T, top_k] come from :func:`route`; ``gate_up``
    [E, 2I, H] and ``down`` [E, H, I] are the weights of experts ``first_expert`` and following,
    ``gate_up_bias`` [E, 2I] and ``down_bias`` [E, H] their biases. The weights of an expert are
    read once, and only if some row chose it. ``weighs_input``: whether a weight, rounded to the
    dtype of ``x``, is a factor on the expert's input instead."""
    held, top_k = gate_up.shape[0], experts.shape[1]
    chosen, order = experts.flatten().sort(stable=True)
    rows, weights = order // top_k, weights.flatten()[order, None]
    counts = torch.bincount(chosen, minlength=first_expert + held).tolist()
    by_expert = torch.zeros(len(order), x.shape[1], dtype=torch.float32)
    begin = sum(counts[:first_expert])
    for expert, count in enumerate(counts[first_expert : first_expert + held]):
        if count == 0:
            continue
        end = begin + count
        inputs = x[rows[begin:end]]
        if weighs_input:
            inputs = inputs * weights[begin:end].to(x.dtype)
        result = gated_mlp(
            inputs,
            gate_up[expert],
            down[expert],
            gate_up_bias=None if gate_up_bias is None else gate_up_bias[expert],
            down_bias=None if down_bias is None else down_bias[expert],
            swiglu_limit=swiglu_limit,
        )
        if weighs_input:
            by_expert[begin:end] = result
        else:
            torch.mul(result, weights[begin:end], out=by_expert[begin:end])
        begin = end
    by_row = by_expert[order.argsort()]
    first, *others = by_row.view(-1, top_k, x.shape[1]).unbind(dim=1)
    for other in others:  # in one order, which a sum over the dimension does not promise
        first += other
    return first
