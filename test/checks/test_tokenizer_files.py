"""A model whose tokenizer is missing or broken is refused before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from crosspool.checks.tokenizer_files import check_tokenizer
from crosspool.config.deployment import ConfigError, ModelConfig
from support.server import DEMO, TINY_MODELS
from transformers import AutoTokenizer

FAST = DEMO / "tiny-qwen3-moe" / "tokenizer.json"
PIECES = DEMO / "tiny-deepseek-v2" / "tokenizer.model"
EMPTY = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}})


def check(folder: Path, **arguments: Any) -> None:
    check_tokenizer(ModelConfig(name="m", path=str(folder)), arguments)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_bundled_models_have_tokenizers(name: str) -> None:
    check(DEMO / name)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check(tmp_path)
    said = str(error.value)
    assert said.startswith(f"tokenizer of m: {tmp_path} has neither tokenizer.json nor tokenizer.m")
    assert "--tokenizer-path" in said
    check(tmp_path, tokenizer_path=str(FAST.parent))


def test_a_tokenizer_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_path of m: .*nowhere is no folder"):
        check(FAST.parent, tokenizer_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"tokenizer_path of m: .* has neither"):
        check(FAST.parent, tokenizer_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer_path of m: .*t\.json is missing"):
        check(FAST.parent, tokenizer_path=str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("tokenizer.json", FAST.read_bytes()[:5000], "is no tokenizer: "),
        ("tokenizer.json", b"{}", "is no tokenizer: "),
        ("tokenizer.json", b"\xff\xfe", "is no tokenizer: "),
        ("tokenizer.json", EMPTY.encode(), "is no tokenizer: its vocabulary is empty"),
        ("tokenizer.model", PIECES.read_bytes()[:-9], "is no tokenizer: "),
        ("tokenizer.model", b"", "is no tokenizer: it is empty"),
        ("tokenizer_config.json", b"{", "is not valid JSON"),
        ("tokenizer_config.json", b"[]", "must hold a JSON object"),
        ("special_tokens_map.json", b"{", "is not valid JSON"),
        ("added_tokens.json", b"{", "is not valid JSON"),
    ],
)
def test_broken_files(tmp_path: Path, file: str, text: bytes, problem: str) -> None:
    if not file.startswith("tokenizer."):
        shutil.copy(FAST, tmp_path)
    (tmp_path / file).write_bytes(text)
    with pytest.raises(ConfigError, match=f"^tokenizer of m: {tmp_path / file} {problem}"):
        check(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "tekken.json"])
def test_a_file_that_cannot_be_read(tmp_path: Path, file: str) -> None:
    (tmp_path / file).mkdir()
    with pytest.raises(ConfigError, match=f"of m: {tmp_path / file} cannot be read: Is a dir"):
        check(tmp_path)


def test_a_folder_with_sentencepiece_alone(tmp_path: Path) -> None:
    """Many checkpoints have no tokenizer.json; transformers makes one of the pieces."""
    for file in PIECES.parent.glob("*token*"):
        if file.name != "tokenizer.json":
            shutil.copy(file, tmp_path)
    shutil.copy(PIECES.parent / "config.json", tmp_path)
    check(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "The import statement, 42 naïve cafés"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) < len(text) and tokenizer.decode(ids) == text


def test_code_of_the_folders_own(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    check(tmp_path, trust_remote_code=True)
    with pytest.raises(ConfigError, match="has neither"):
        check(tmp_path)
