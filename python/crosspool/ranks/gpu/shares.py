"""Shares of FFN parts that the GPU's kernels take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError
from crosspool.models.spec import ModelSpec, MoEFFN
from crosspool.weightpool.placement import FFNShard

if TYPE_CHECKING:
    from crosspool.config.deployment import ModelConfig

_COLUMNS = 16
"""The kernels take gated MLPs whose widths are multiples of this many columns."""


def check_share(model: ModelConfig, spec: ModelSpec, shard: FFNShard) -> None:
    """Raises ConfigError for a share of gated MLPs that the kernels do not take."""
    for ffn in dict.fromkeys(spec.ffn):
        shared = [ffn.intermediate] if not isinstance(ffn, MoEFFN) else [ffn.shared_intermediate]
        if isinstance(ffn, MoEFFN):
            if shard.parallel == "tp":
                shared.append(ffn.intermediate)
            elif not shard.experts(ffn):
                raise ConfigError(
                    f"{model.name}: {ffn.experts} experts cannot be dealt to {shard.ranks} GPUs"
                )
        for columns in shared:
            share = shard.width(columns)
            if share % _COLUMNS or (columns and not share):
                raise ConfigError(
                    f"{model.name}: gated MLPs of {columns} columns cannot be split between "
                    f"{shard.ranks} GPUs: shares must be multiples of {_COLUMNS} columns; name "
                    "fewer in the model's weight_pool_devices"
                )
