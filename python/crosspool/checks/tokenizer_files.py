"""Checks a model's tokenizer before anything starts. Transformers makes an empty tokenizer of a
folder that has none, which then takes no prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosspool.config.deployment import ConfigError, ModelConfig
from crosspool.models.config_file import read_json
from crosspool.models.gguf_header import gguf_files, read_header
from crosspool.models.gguf_tokenizer import GGUFTokenizer

_CONFIG = "tokenizer_config.json"
_SETTINGS = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
_FAST = "tokenizer.json"
_PIECES = "tokenizer.model"
_OTHERS = ("vocab.json", "tekken.json", "tiktoken.model", "*.tiktoken")
"""Files of tokenizers that are not tried here; one that is there must be readable."""


def check_tokenizer(model: ModelConfig, arguments: Mapping[str, Any]) -> None:
    """Checks the tokenizer of ``model``, which has these arguments for SGLang.

    Raises ConfigError that names the model, the folder and the file when the model's tokenizer
    is missing, cannot be read or is broken."""
    given = arguments.get("tokenizer_path")
    where = f"tokenizer_path of {model.name}" if given else f"tokenizer of {model.name}"
    path = Path(given or model.path)
    try:
        if not given and gguf_files(path):
            tokenizer = GGUFTokenizer(read_header(gguf_files(path))).tokenizer_json()
            _check_content(json.dumps(tokenizer).encode(), path)
        elif path.suffix == ".json":  # SGLang takes such a file for one in tiktoken's format
            read_json(path)
        elif not path.is_dir():
            raise ConfigError(f"{path} is no folder")
        else:
            _check_folder(path, arguments.get("trust_remote_code", False))
    except OSError as error:
        raise ConfigError(f"{where}: {error.filename} cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    settings = {name: read_json(folder / name) for name in _SETTINGS if (folder / name).exists()}
    if (folder / _FAST).exists():
        return _check_fast(folder / _FAST)
    if trust_remote_code and "auto_map" in settings.get(_CONFIG, {}):
        return None  # the folder's own code reads whatever files it has
    if (folder / _PIECES).exists():
        return _check_pieces(folder / _PIECES)
    others = [file for pattern in _OTHERS for file in sorted(folder.glob(pattern))]
    if not others:
        raise ConfigError(
            f"{folder} has neither {_FAST} nor {_PIECES}: add the tokenizer's files, or name their "
            "folder with --tokenizer-path"
        )
    for file in others:
        file.open("rb").close()
    return None


def _check_fast(file: Path) -> None:
    _check_content(file.read_bytes(), file)


def _check_content(text: bytes, file: Path) -> None:
    from tokenizers import Tokenizer

    try:
        size = Tokenizer.from_buffer(text).get_vocab_size()
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{file} is no tokenizer: {error}") from None
    if size == 0:
        raise ConfigError(f"{file} is no tokenizer: its vocabulary is empty")


def _check_pieces(file: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    content = file.read_bytes()
    if not content:
        raise ConfigError(f"{file} is no tokenizer: it is empty")
    try:
        SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ConfigError(f"{file} is no tokenizer: {error}") from None
