"""The FFN stages of a GPU: a rank's share of a model's FFN part, over a lane's fixed buffers; on
the lane of an attention rank of the same GPU, or behind the links of other devices' lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from crosspool.kernels.cuda_loop import GPUStage
from crosspool.kernels.triton.exchange import send_rows, take_dispatch
from crosspool.kernels.triton.expert_plan import plan_experts
from crosspool.kernels.triton.experts import gated_mlps
from crosspool.kernels.triton.linear import linear
from crosspool.kernels.triton.router import route
from crosspool.models.spec import ModelSpec, MoEFFN
from crosspool.ranks.gpu.links import LanePayloads
from crosspool.ranks.gpu.scratch import Carver, FFNScratch, KindScratch, LaneBuffers
from crosspool.ranks.gpu.weights import GPUFFN

StageCall = Callable[[], None]


def ffn_stages(lane: LaneBuffers, scratch: FFNScratch) -> dict[GPUStage, StageCall]:
    """Returns a stage for each kind of layer; it turns ``scratch.payload`` into
    ``scratch.partial``."""
    return {
        GPUStage.MOE_FFN if isinstance(work.kind.ffn, MoEFFN) else GPUStage.DENSE_FFN: _stage(
            work, lane, scratch
        )
        for work in scratch.kinds
    }


class ServedStages:
    """FFN stages of one model in one row bucket, on a lane that serves other devices. Each takes
    the rows out of the link through which they came, and leaves its partial sums there."""

    def __init__(
        self,
        spec: ModelSpec,
        ffn: GPUFFN,
        bucket: int,
        lane: LaneBuffers,
        *,
        payloads: LanePayloads,
        served: Tensor,
    ) -> None:
        """``served``: int64 [links, 3], counts each link's dispatches, rows and bytes."""
        self.input_elements = 0
        self._lane, self._payloads, self._served = lane, payloads, served
        self._scratch = FFNScratch(spec, ffn.kinds, bucket, Carver(lane.arena))
        self._ffns = ffn_stages(lane, self._scratch)

    @property
    def calls(self) -> Mapping[GPUStage, StageCall]:
        """Every stage that the model has."""
        return {stage: self._around(call) for stage, call in self._ffns.items()}

    def _around(self, ffn: StageCall) -> StageCall:
        lane, scratch, payloads = self._lane, self._scratch, self._payloads

        def call() -> None:
            take_dispatch(payloads.dispatched, lane.link, lane.count, scratch.payload, self._served)
            ffn()
            send_rows(scratch.partial, payloads.combined, lane.count, lane.link)

        return call


def _stage(work: KindScratch, lane: LaneBuffers, s: FFNScratch) -> StageCall:
    kind, bucket = work.kind, len(s.payload)
    rules = kind.ffn.router if isinstance(kind.ffn, MoEFFN) else None
    experts = None if rules is None else s.experts
    weights = None if rules is None else s.expert_weights

    def call() -> None:
        routed = None
        if rules is not None:
            routed = s.experts, s.expert_weights
            assert kind.router is not None
            assert rules.score != "sparsemixer", "check_features refuses it"
            linear(s.payload, kind.router, lane.layer, lane.count, s.router, lane.linear)
            route(
                s.router,
                kind.router_bias,
                lane.layer,
                lane.count,
                *routed,
                score=rules.score,
                groups=rules.groups,
                top_groups=rules.top_groups,
                group_score=rules.group_score,
                renormalize=rules.renormalize,
                scale=rules.scale,
            )
        first = kind.first_expert
        plan_experts(experts, weights, lane.count, bucket, work.plan, first_expert=first)
        gated_mlps(
            s.payload,
            kind.weights,
            lane.layer,
            lane.count,
            work.plan,
            routed,
            s.partial,
            work.workspace,
            first_expert=first,
        )

    return call
