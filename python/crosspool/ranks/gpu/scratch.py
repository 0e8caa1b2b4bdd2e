"""Memory in which the stages of a lane work on a GPU. It is fixed for the lane; each (model, row
bucket) lays it out anew over the same arena, since only one of them is on the lane at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosspool.kernels.cuda_loop import LinkMemory
from crosspool.kernels.triton.argmax import ArgmaxWorkspace
from crosspool.kernels.triton.attention import AttentionWorkspace
from crosspool.kernels.triton.batch import DeviceBatch
from crosspool.kernels.triton.expert_plan import ExpertPlan
from crosspool.kernels.triton.experts import FFNWorkspace
from crosspool.kernels.triton.linear import LinearWorkspace
from crosspool.kernels.triton.sampling import SamplingRules, SamplingWorkspace
from crosspool.models.spec import GQASpec, ModelSpec, MoEFFN
from crosspool.ranks.gpu.inputs import InputLayout
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.weights import FFNKind
from crosspool.ranks.weights import TORCH_DTYPES

_ALIGNMENT = 256


class DeviceInputs:
    """A step's inputs on the device, as the kernels take them. ``count``: int32 [1], the step's
    rows."""

    def __init__(self, layout: InputLayout, memory: Tensor, count: Tensor) -> None:
        flat = memory[: layout.elements]
        self.flat = flat
        fields = {
            name: flat[at : at + size * (dtype.itemsize // 4)].view(dtype)
            for name, (at, size, dtype) in layout.fields.items()
        }
        self.tokens = fields["tokens"]
        self.wanted_rows = fields["wanted_rows"]
        self.wanted_count = flat[2:3]
        self.batch = DeviceBatch(
            count=count,
            positions=fields["positions"],
            sequences=fields["row_sequences"],
            page_table=flat[layout.head :].view(layout.sequences, layout.pages),
        )
        self.rules = SamplingRules(
            temperature=fields["temperature"],
            top_k=fields["top_k"],
            top_p=fields["top_p"],
            min_p=fields["min_p"],
            seed=fields["seed"],
            position=fields["position"],
        )


class LaneBuffers:
    """Memory of a lane for all models and buckets: the loop's words, the chosen tokens, an arena;
    and the lane's links to other devices."""

    def __init__(
        self,
        device: torch.device,
        largest_bucket: int,
        arena_bytes: int,
        *,
        links: Sequence[LinkMemory] = (),
        serves: bool = False,
    ) -> None:
        """``serves``: whether the lane is an FFN rank's, which serves what comes through its
        links."""
        self.device = device
        self.links = tuple(links)
        self.serves = serves
        self.words = torch.zeros(8, dtype=torch.int32, device=device)
        """:class:`crosspool.kernels.cuda_loop_structs.StageWords`."""
        self.chosen = torch.zeros(largest_bucket, dtype=torch.int32, device=device)
        self.arena = torch.zeros(arena_bytes, dtype=torch.uint8, device=device)
        self.linear = LinearWorkspace.allocate(device)

    @property
    def address(self) -> Tensor:
        """int64 [1]: address of the step's inputs."""
        return self.words[:2].view(torch.int64)

    @property
    def layer(self) -> Tensor:
        return self.words[2:3]

    @property
    def link(self) -> Tensor:
        """int32 [1]: index of the link through which a served dispatch came."""
        return self.words[3:4]

    @property
    def count(self) -> Tensor:
        """int32 [1]: rows of the step, or of the dispatch."""
        return self.words[4:5]


class Carver:
    """Cuts tensors out of a lane's arena; without an arena, it only adds up how large one must
    be."""

    def __init__(self, arena: Tensor | None) -> None:
        self._arena = arena
        self.used = 0
        self.device = torch.device("meta") if arena is None else arena.device

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor of any content."""
        begin, size = self.used, torch.Size(shape).numel() * dtype.itemsize
        self.used = -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT
        if self._arena is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return self._arena[begin : begin + size].view(dtype).view(shape)


@dataclass(frozen=True)
class KindScratch:
    """Memory in which the FFN layers of one kind work."""

    kind: FFNKind
    plan: ExpertPlan
    workspace: FFNWorkspace

    @classmethod
    def allocate(cls, spec: ModelSpec, kind: FFNKind, rows: int, carver: Carver) -> KindScratch:
        ffn, shared = kind.ffn, kind.weights.shared_gate_up is not None
        top_k = ffn.router.top_k if isinstance(ffn, MoEFFN) else 0
        held = kind.held if kind.weights.gate_up is not None else 0
        plan = ExpertPlan.allocate(rows, top_k, held, shared, carver)
        workspace = FFNWorkspace.allocate(rows, spec.hidden, kind.weights, plan, carver)
        return cls(kind, plan, workspace)


class FFNScratch:
    """Input, workspace and output of an FFN part."""

    def __init__(
        self, spec: ModelSpec, kinds: Sequence[FFNKind], rows: int, carver: Carver
    ) -> None:
        """``kinds``: kinds of the rank's layers; ``rows``: rows of the bucket."""
        dtype = TORCH_DTYPES[spec.dtype]
        self.payload = carver.take(dtype, rows, spec.hidden)
        """The FFN part's input, which a dispatch carries."""
        self.partial = carver.take(dtype, rows, spec.hidden)
        """The FFN part's output, which a combine brings."""
        moe = [ffn for ffn in spec.ffn if isinstance(ffn, MoEFFN)]
        experts = max((ffn.experts for ffn in moe), default=0)
        top_k = max((ffn.router.top_k for ffn in moe), default=0)
        fp32 = any(ffn.router.fp32_logits for ffn in moe)
        self.router = carver.take(torch.float32 if fp32 else dtype, rows, experts)
        self.experts = carver.take(torch.int32, rows, top_k)
        self.expert_weights = carver.take(torch.float32, rows, top_k)
        self.kinds: list[KindScratch] = []
        begin = end = carver.used
        for kind in kinds:  # over each other: a lane runs one layer at a time
            carver.used = begin
            self.kinds.append(KindScratch.allocate(spec, kind, rows, carver))
            end = max(end, carver.used)
        carver.used = end

    @classmethod
    def bytes_of_rows(cls, spec: ModelSpec, kinds: Sequence[FFNKind], rows: int) -> int:
        """Bytes that an FFN part takes of an arena by itself."""
        carver = Carver(None)
        FFNScratch(spec, kinds, rows, carver)
        return carver.used


class Scratch(FFNScratch):
    """Tensors of one (model, bucket) on a lane of an attention rank; their rows are the bucket's,
    unless said."""

    def __init__(self, model: GPUModel, layout: InputLayout, carver: Carver) -> None:
        spec = model.spec
        super().__init__(spec, model.ffn.kinds if model.ffn else (), layout.bucket, carver)
        dtype, rows, wanted = TORCH_DTYPES[spec.dtype], layout.bucket, layout.wanted

        def take(*shape: int) -> Tensor:
            return carver.take(dtype, *shape)

        self.inputs = carver.take(torch.int32, layout.elements)
        self.residual = take(rows, spec.hidden)
        self.normed = take(rows, spec.hidden)
        a = spec.attention
        if isinstance(a, GQASpec):
            self.projected = take(rows, (a.q_heads + 2 * a.kv_heads) * a.head_dim)
            self.q = take(rows, a.q_heads, a.head_dim)
            self.attended = take(rows, a.q_heads, a.head_dim)
        else:
            lora, cached = a.q_lora_rank or 0, a.kv_lora_rank + a.qk_rope_head_dim
            self.projected = take(rows, lora + cached)
            self.q_normed = take(rows, lora)
            self.plain = take(rows, a.q_heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
            self.q = take(rows, a.q_heads, cached)
            self.latents = take(rows, a.q_heads, a.kv_lora_rank)
            self.attended = take(rows, a.q_heads, a.v_head_dim)
        self.splits = AttentionWorkspace.allocate(
            rows,
            a.q_heads,
            a.kv_heads if isinstance(a, GQASpec) else 1,
            a.head_dim if isinstance(a, GQASpec) else a.kv_lora_rank,
            carver,
        )
        self.last = take(wanted, spec.hidden)
        """Residuals of the wanted rows [wanted, hidden]."""
        self.last_partial = take(wanted, spec.hidden)
        self.last_normed = take(wanted, spec.hidden)
        self.logits = carver.take(torch.float32, wanted, spec.vocab)
        self.best = carver.take(torch.int32, wanted)
        self.argmax = ArgmaxWorkspace.allocate(wanted, spec.vocab, carver)
        self.sampling = SamplingWorkspace.allocate(wanted, spec.vocab, carver)

    @classmethod
    def bytes(cls, model: GPUModel, layout: InputLayout) -> int:
        """Bytes that the tensors take of an arena."""
        carver = Carver(None)
        cls(model, layout, carver)
        return carver.used
