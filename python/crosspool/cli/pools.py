"""``crosspool pools``: what the pools of a running server hold."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence

from crosspool.config.deployment import Deployment
from crosspool.config.runtime_dir import find_running
from crosspool.config.sizes import format_size
from crosspool.kvpool.layout import KVLayout
from crosspool.models.registry import specs_of
from crosspool.models.spec import ModelSpec
from crosspool.observability.pools_table import (
    ModelRow,
    RankRow,
    make_console,
    pools_tables,
)
from crosspool.transport import admin
from crosspool.transport.inspection import Status, TensorInfo
from crosspool.weightpool.experts import share_of
from crosspool.weightpool.placement import Placement, place

_EPILOG = """\
examples:
  crosspool pools                         # devices, ranks, models, KV memory in use
  crosspool pools --tensors               # and every tensor that each rank holds
  crosspool pools --tensors | grep 'FFN 0'
"""
_ROLES = {"attention": "attention", "ffn": "FFN"}


def run(words: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Shows the pools of a server that you run on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tensors", action="store_true", help="also list the tensors of every rank"
    )
    parser.add_argument("--port", type=int, help="port of the server, if several run here")
    arguments = parser.parse_args(words)

    deployment = find_running(arguments.port)
    specs = specs_of(deployment.models)
    placement = place(deployment, specs)
    status = admin.status(deployment.admin_address)
    rows = describe(deployment, specs, placement, status)
    make_console().print(pools_tables(*rows, status.models))
    if arguments.tensors:
        report = admin.inspect(deployment.admin_address, "tensors", timeout=30.0)
        _print_tensors(report.tensors)
        if report.missing:
            print(f"\nnothing is told of {', '.join(report.missing)}, away now")
    print(f"\nTo attach a stock SGLang server: CROSSPOOL_ADMIN={deployment.admin_address}")
    socket = shlex.quote(str(deployment.admin_socket))
    print(f"To manage the server: curl -X POST --unix-socket {socket} http://admin/flush_cache")
    return 0


def _print_tensors(tensors: Sequence[TensorInfo]) -> None:
    """Prints one line for each tensor, in columns that grep and awk can read, and the sum of each
    rank."""
    sums: dict[str, int] = {}
    print()
    for tensor in tensors:
        rank = f"{_ROLES[tensor.role]} {tensor.rank}"
        sums[rank] = sums.get(rank, 0) + tensor.bytes
        shape = "x".join(map(str, tensor.shape))
        print(
            f"{rank:12} {tensor.bytes:>12} {tensor.dtype:9} {shape:>16}  "
            f"{tensor.model}  {tensor.name}"
        )
    print()
    for rank, size in sums.items():
        print(f"{rank:12} {size:>12} bytes in all ({format_size(size)})")


def describe(
    deployment: Deployment,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    status: Status | None = None,
) -> tuple[list[RankRow], list[ModelRow]]:
    """The rows of the pools' tables, with the memory in use now where ``status`` is known."""
    ranks = len(deployment.kv_pool_devices)
    chunks = deployment.kv_pool_bytes // ranks // deployment.chunk_bytes
    devices = {} if status is None else {device.name: device for device in status.devices}
    by_rank = [
        RankRow(
            rank=f"attention {rank}",
            device=device.name,
            weights=sum(
                held
                for number, held in placement.attention_bytes.items()
                if rank in deployment.attention_ranks(number)
            ),
            kv_budget=chunks * deployment.chunk_bytes,
            now=None if status is None else status.ranks[rank],
            process=devices.get(device.name),
        )
        for rank, device in enumerate(deployment.kv_pool_devices)
    ]
    by_rank += [
        RankRow(
            rank=f"FFN {rank}",
            device=device.name,
            weights=sum(weights.values()) + share_of(deployment),
            kv_budget=None,
            process=devices.get(device.name),
        )
        for rank, (device, weights) in enumerate(
            zip(deployment.weight_pool_devices, placement.weight_bytes, strict=True)
        )
    ]
    by_model = []
    for number, model in deployment.models.items():
        spec = specs[number]
        layout = KVLayout(spec, deployment.page_size, deployment.chunk_bytes)
        own = len(deployment.attention_ranks(number))
        by_model.append(
            ModelRow(
                name=model.name,
                dtype=spec.dtype,
                kv_dtype=spec.kv_dtype,
                attention_weights=placement.attention_bytes[number],
                ffn_weights=sum(
                    held[number] for held in (*placement.weight_bytes, *placement.expert_bytes)
                ),
                ffn_ranks=deployment.ffn_ranks(number),
                kv_per_token=spec.kv_bytes_per_token,
                state=spec.state_bytes,
                pages=own * layout.pages_in(chunks),
                tokens=own * layout.tokens_in(layout.pages_in(chunks)),
                context=spec.context,
            )
        )
    return by_rank, by_model
