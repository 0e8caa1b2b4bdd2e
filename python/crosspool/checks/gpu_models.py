"""Which models GPUs do not compute."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.models.spec import GQASpec, ModelSpec, MoEFFN


def check_gpu_models(
    deployment: Deployment, models: Iterable[tuple[ModelConfig, ModelSpec]]
) -> None:
    """Raises ConfigError for a model whose parts the kernels of the deployment's devices do not
    compute; it says which parts these are."""
    if all(device.is_cpu for device in deployment.devices):
        return
    for model, spec in models:
        if lacking := _lacking(spec):
            raise ConfigError(
                f"{model.name}: {Path(model.path) / 'config.json'}: model_type={spec.family!r} is "
                f"served on CPUs alone, as GPUs do not compute {', '.join(lacking)}: name CPUs in "
                "kv_pool_devices and weight_pool_devices"
            )


def _lacking(spec: ModelSpec) -> list[str]:
    attention = spec.attention
    moes = [ffn for ffn in dict.fromkeys(spec.ffn) if isinstance(ffn, MoEFFN)]
    parts = {
        "attention sinks": isinstance(attention, GQASpec) and attention.sinks,
        "sliding windows in some layers alone": isinstance(attention, GQASpec)
        and attention.sliding_window is not None
        and bool(attention.full_layers),
        "clamped SwiGLU": any(moe.swiglu_limit is not None for moe in moes),
        "biases of experts": any(moe.biases for moe in moes),
        "biases of routers": any(moe.router.logit_bias for moe in moes),
    }
    return [part for part, has in parts.items() if has]
