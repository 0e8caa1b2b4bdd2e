"""The first layers of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path


def shallow(
    checkpoint: Path, folder: Path, layers: int | None = None, dtype: str | None = None
) -> Path:
    """The first layers of a checkpoint (None: all), in a dtype (None: its own): its files beside a
    config.json that says so."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
        for field in ("mlp_layer_types", "layer_types"):
            if field in config:
                config[field] = config[field][:layers]
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
