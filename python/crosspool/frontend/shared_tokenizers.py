"""Tokenizers, of which all models have one together whose folders say the same of it.

Fleets have variants of one model. To read a tokenizer takes up to a second, most of which it holds
Python's interpreter, and every tokenizer takes memory.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sglang.srt.utils.hf_transformers_utils import get_tokenizer as read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = frozenset((".jinja", ".json", ".model", ".py", ".tiktoken", ".txt"))
"""What the names of files end with that SGLang and transformers may read for a tokenizer."""

_tokenizers: dict[bytes, WeakSet[PreTrainedTokenizerBase]] = {}
"""The tokenizers in use, by what was read."""
_lock = threading.Lock()


def get_tokenizer(path: str, **arguments: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that SGLang's function of this name does, with attributes of its own.
    What encodes and decodes is that of a tokenizer in use if a folder of the same content was read
    with the same ``arguments``.

    Raises what SGLang's function raises."""
    tokenizer: PreTrainedTokenizerBase
    if not Path(path).is_dir():
        tokenizer = read_tokenizer(path, **arguments)
        return tokenizer
    with _lock:
        key = _content(Path(path), arguments)
        in_use = _tokenizers.setdefault(key, WeakSet())
        same = next(iter(in_use), None)
        tokenizer = read_tokenizer(path, **arguments) if same is None else _copied(same, path)
        in_use.add(tokenizer)
        for other in [key for key, in_use in _tokenizers.items() if not in_use]:
            del _tokenizers[other]
    return tokenizer


def _content(folder: Path, arguments: dict[str, Any]) -> bytes:
    """A digest of the files and the arguments from which a tokenizer is made."""
    digest = hashlib.blake2b(repr(sorted(arguments.items())).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SUFFIXES and not path.name.endswith(".index.json") and path.is_file():
            digest.update(f"{path.relative_to(folder)} ".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return digest.digest()


def _copied(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """A tokenizer with the same backend, of which attributes can be set without the other's."""
    copied = copy.copy(tokenizer)
    for name, value in vars(tokenizer).items():
        if isinstance(value, dict | list | set):
            setattr(copied, name, copy.copy(value))
    copied.name_or_path = path
    return copied
