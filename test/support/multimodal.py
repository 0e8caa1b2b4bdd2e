"""Checkpoints of multimodal models that have a given language model, as they are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

_OUTER = {
    "llama4_text": ("llama4", "Llama4ForConditionalGeneration"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
}
"""Model types and architectures of multimodal models, by those of their language models."""


def as_multimodal(path: Path, out: Path) -> Path:
    """Writes to ``out`` a multimodal model with the language model of ``path``, all tensors in one
    file. For other language models copies ``path``. Returns ``out``."""
    shutil.copytree(path, out)
    text = json.loads((path / "config.json").read_text())
    language = text["model_type"]
    if language not in _OUTER:
        return out
    outer, architecture = _OUTER[language]
    del text["architectures"]
    config = CONFIG_MAPPING[outer]().to_dict() | {"text_config": text, "dtype": text["dtype"]}
    config["architectures"] = [architecture]
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    named = {_name(name, language): tensor for name, tensor in tensors.items()}
    named["vision_model.class_embedding"] = torch.ones(8)
    save_file(named, out / "model.safetensors", {"format": "pt"})
    return out


def _name(name: str, language: str) -> str:
    if language == "llama4_text":
        return f"language_model.{name}"
    return name.replace("model.", "model.language_model.", 1)
