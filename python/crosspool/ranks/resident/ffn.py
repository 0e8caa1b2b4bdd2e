"""A model's FFN part on one FFN rank, in the packed form that the resident loop reads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from crosspool.kernels import engine_structs as es
from crosspool.kernels import native_structs as ns
from crosspool.kernels.engine import Team
from crosspool.models.registry import ffn_tensors
from crosspool.models.spec import FFNSpec, ModelSpec, MoEFFN, RouterSpec, TensorRef
from crosspool.observability.progress import Progress
from crosspool.ranks.resident.declarations import Index, whole
from crosspool.ranks.resident.kept_weights import KeptWeights, OpenWeights
from crosspool.ranks.resident.pack_sources import gated_columns, pointer
from crosspool.ranks.resident.packing import PackedWeights
from crosspool.ranks.weights import TensorListing
from crosspool.weightpool.placement import FFNShard


@dataclass(frozen=True)
class _Experts:
    """The routed experts of one layer."""

    layer: int
    gate_up: ctypes.Array[ns.Matrix]
    down: ctypes.Array[ns.Matrix]
    first: int
    """Number of the first matrix; those of ``down`` follow those of ``gate_up``."""


class PackedFFN:
    """Fills the FFN part's field of a :class:`ModelTable`, and owns what it points to."""

    role = "ffn"
    native = es.FFN_WEIGHTS

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        shard: FFNShard,
        *,
        on_demand: bool = False,
    ) -> None:
        """``on_demand``: whether a pool has the routed experts, see :meth:`pooled`."""
        self._spec = spec
        self._path = path
        self._shard = shard
        self.on_demand = on_demand
        self.weights = PackedWeights(spec.dtype)
        self._layers = (es.FFNTable * spec.layers)()
        self._biases: list[Tensor] = []
        self._experts: list[_Experts] = []
        for layer, ffn in enumerate(spec.ffn):
            self._declare(layer, ffn)
        self.weights.settle()

    def load(self, team: Team, progress: Progress, kept: KeptWeights | None = None) -> None:
        """Loads the rank's share from ``kept``, or packs it; ``progress`` is called with bytes
        read.

        Raises ConfigError for a checkpoint that does not fit its config.json."""
        self.weights.load(self._path, team, progress, kept)

    def derive(self) -> None:
        """Computes what follows from the stage before all others: nothing."""

    def fill(self, table: es.ModelTable) -> None:
        table.ffn = self._layers

    def pooled(self, opened: OpenWeights) -> ctypes.Array[es.PooledExpert]:
        """Returns where the routed experts are in an open file, layer after layer."""
        found = []
        for of in self._experts:
            for i in range(len(of.gate_up)):
                places = (of.first + i, of.first + len(of.gate_up) + i)
                (gate_up, gate_up_sum), (down, down_sum) = map(opened.layout.place_of, places)
                found.append(
                    es.PooledExpert(
                        ctypes.pointer(of.gate_up[i]),
                        ctypes.pointer(of.down[i]),
                        *(gate_up, down, gate_up_sum, down_sum, of.layer),
                    )
                )
        return (es.PooledExpert * len(found))(*found)

    def tensors(self) -> list[TensorListing]:
        """Lists every share of a tensor that the rank holds, but for experts on demand; none while
        the model sleeps."""
        return self.weights.held()

    def close(self) -> None:
        """Gives the memory back, after the loop was closed."""
        self.weights.close()

    def _declare(self, layer: int, ffn: FFNSpec) -> None:
        parts: dict[str, tuple[TensorRef, Index]] = {}
        for ref in ffn_tensors(self._spec, layer):
            if (index := self._shard.slice(ref, ffn)) is not None:
                parts[ref.key] = (ref, index)
        table = self._layers[layer]
        if not isinstance(ffn, MoEFFN):
            self._shared(table.layer, layer, "mlp", ffn.intermediate, parts)
            return
        self._router(table, layer, ffn, parts)
        held = self._shard.experts(ffn)
        whole_experts = self._shard.parallel == "ep"
        width = ffn.intermediate if whole_experts else self._shard.width(ffn.intermediate)
        if width > 0 and len(held) > 0:
            first = self.weights.count
            gate_up, down = self._pair(layer, len(held), width, on_demand=self.on_demand)
            for i, expert in enumerate(held):
                key = f"experts.{expert}"
                self._fill_mlp(layer, key, parts, gate_up[i], down[i], on_demand=self.on_demand)
            if self.on_demand:
                self._experts.append(_Experts(layer, gate_up, down, first))
            table.layer.gate_up, table.layer.down = gate_up, down
            table.layer.first_expert, table.layer.held = held.start, len(held)
            if ffn.biases:
                self._expert_biases(table.layer, layer, width, held, parts)
            table.layer.swiglu_limit = ffn.swiglu_limit or 0.0
            table.layer.weighs_input = ffn.weighs_input
        table.layer.top_k = ffn.router.top_k
        if ffn.shared_intermediate:
            self._shared(table.layer, layer, "shared", ffn.shared_intermediate, parts)

    def _expert_biases(
        self,
        table: ns.FFNLayer,
        layer: int,
        width: int,
        held: range,
        parts: dict[str, tuple[TensorRef, Index]],
    ) -> None:
        """Declares the biases of the routed experts; those of ``down`` where they are held here."""
        columns = gated_columns(width)
        shape = (len(held), columns // ns.PANEL, 2, ns.PANEL)
        gate_up = self.weights.array(layer, shape, torch.float32)
        self._biases.append(gate_up)
        table.gate_up_bias = pointer(gate_up)
        for i, expert in enumerate(held):
            for half, name in enumerate(("gate", "up")):
                ref, index = parts[f"experts.{expert}.{name}_bias"]
                into = gate_up[i, :, half]

                def finish(tensors: list[Tensor], into: Tensor = into) -> None:
                    into.copy_(F.pad(tensors[0], (0, columns - width)).view_as(into))

                self.weights.custom(layer, ref, finish, index)
        if f"experts.{held.start}.down_bias" not in parts:
            return
        down = self.weights.array(layer, (len(held), self._spec.hidden), torch.float32)
        self._biases.append(down)
        table.down_bias = pointer(down)
        for i, expert in enumerate(held):
            self.weights.copied(layer, parts[f"experts.{expert}.down_bias"][0], down[i])

    def _shared(
        self,
        table: ns.FFNLayer,
        layer: int,
        key: str,
        intermediate: int,
        parts: dict[str, tuple[TensorRef, Index]],
    ) -> None:
        """Declares a gated MLP that every row goes through."""
        width = self._shard.width(intermediate)
        if width == 0:
            return
        gate_up, down = self._pair(layer, 1, width)
        self._fill_mlp(layer, key, parts, gate_up[0], down[0])
        table.shared_gate_up, table.shared_down = gate_up, down

    def _pair(
        self, layer: int, count: int, width: int, *, on_demand: bool = False
    ) -> tuple[ctypes.Array[ns.Matrix], ctypes.Array[ns.Matrix]]:
        """Returns the matrices of ``count`` gated MLPs: gate and up in one, and down."""
        hidden = self._spec.hidden
        return (
            self.weights.matrices(
                layer, count, 2 * gated_columns(width), hidden, on_demand=on_demand
            ),
            self.weights.matrices(layer, count, hidden, width, on_demand=on_demand),
        )

    def _fill_mlp(
        self,
        layer: int,
        key: str,
        parts: dict[str, tuple[TensorRef, Index]],
        gate_up: ns.Matrix,
        down: ns.Matrix,
        *,
        on_demand: bool = False,
    ) -> None:
        gate, up = parts[f"{key}.gate"], parts[f"{key}.up"]
        self.weights.gated(layer, gate, up, gate_up, on_demand=on_demand)
        self.weights.stacked(layer, [parts[f"{key}.down"]], down, on_demand=on_demand)

    def _router(
        self,
        table: es.FFNTable,
        layer: int,
        ffn: MoEFFN,
        parts: dict[str, tuple[TensorRef, Index]],
    ) -> None:
        rules: RouterSpec = ffn.router
        rows = ["router", "shared_gate"] if ffn.shared_gate else ["router"]
        matrix = self.weights.stacked(layer, [parts[key] for key in rows])
        table.router_weight = ctypes.pointer(matrix)
        bias = None
        if rules.correction_bias:
            ref, index = parts["router_bias"]
            assert index == whole(ref)
            bias = self.weights.floats(layer, ref)
            self._biases.append(bias)
        if rules.logit_bias:
            self._biases.append(self.weights.floats(layer, parts["logit_bias"][0]))
            table.router_bias = pointer(self._biases[-1])
        table.router = ns.Router(
            bias=pointer(bias),
            experts=ffn.experts,
            top_k=rules.top_k,
            groups=rules.groups,
            top_groups=rules.top_groups,
            score=ns.SCORES[rules.score],
            group_score=ns.GROUP_SCORES[rules.group_score],
            renormalize=rules.renormalize,
            scale=rules.scale,
            jitter=rules.jitter,
        )
