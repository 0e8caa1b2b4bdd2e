"""What the GPU's kernels lack is refused by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from crosspool.checks.models import check_engine
from crosspool.config.deployment import ConfigError, ModelConfig
from crosspool.config.device import Device, parse_devices
from crosspool.models.registry import read_model
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES

LACKING = {
    "glm4-moe": "heads that rotate in part",
    "qwen2-moe": "a shared expert with a gate",
    "minimax-m2": "heads that rotate in part",
    "granite": "factors on embeddings, attention or logits",
    "hunyuan": "norms of rotated heads",
    "llama4": "attention within chunks, layers without rotations, weights of experts on",
    "phimoe-short": "LayerNorms, a bias of the LM head, routing by sparsemixer",
    "qwen3-next": "gates on what heads attend to, gated delta nets",
    "qwen3.5": "gates on what heads attend to, gated delta nets",
}
COMPUTED = ("qwen3", "llama3", "mixtral", "glm")


@pytest.mark.parametrize("shape", [*LACKING, *COMPUTED])
def test_features(shape: str, tmp_path: Path) -> None:
    path = make_random_checkpoint(SHAPES[shape][0], tmp_path / "c", SHAPES[shape][1])
    spec, model = read_model(path), ModelConfig(name="mine", path=str(path))
    check_engine(model, spec, [Device("cpu:0")])
    gpus = parse_devices("cuda:0,cuda:1")
    if shape in COMPUTED:
        check_engine(model, spec, gpus)
        return
    with pytest.raises(ConfigError, match=f"mine: model_type=.* {LACKING[shape]}"):
        check_engine(model, spec, gpus)
