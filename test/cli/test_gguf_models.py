"""GGUF files as models of a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crosspool.cli.prepare import prepare
from crosspool.config.deployment import ConfigError
from crosspool.config.deployment_file import to_options
from crosspool.config.options import Options
from make_random_checkpoint import make_random_checkpoint
from support import gguf_files
from support.server import DEMO

QWEN = DEMO / "tiny-qwen3-moe"


def draft(path: Path, **fields: Any) -> Options:
    return to_options({"models": [{"path": str(path), **fields}], "port": 0}, "test")


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    file, _ = gguf_files.convert(QWEN, tmp_path / "made", lambda name: "Q8_0")
    prepared = prepare(draft(file))
    assert prepared.deployment.models[0].name == "model"
    spec = prepared.specs[0]
    assert (spec.family, spec.vocab, spec.eos_token_ids) == ("qwen3_moe", 2048, (2, 0))


def test_a_gguf_file_whose_tokenizer_is_not_known_needs_another(tmp_path: Path) -> None:
    path = make_random_checkpoint("olmoe", tmp_path / "random", {"vocab_size": 2048}, "float32")
    file, _ = gguf_files.convert(path, tmp_path / "made", lambda name: "F16")
    problem = r"tokenizer of model: .*model\.gguf: tokenizer\.ggml\.tokens: .*--tokenizer-path"
    with pytest.raises(ConfigError, match=problem):
        prepare(draft(file))
    given = prepare(draft(file, sglang={"tokenizer_path": str(QWEN)}))
    assert given.specs[0].family == "olmoe"


def test_a_broken_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"a\.gguf ends within its header"):
        prepare(draft(file))
