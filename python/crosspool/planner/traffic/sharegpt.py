"""Reads request lengths from a ShareGPT file: a JSON list of conversations."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Ints
from crosspool.planner.traffic.trace import Trace
from crosspool.planner.traffic.trace_columns import JSON_ERRORS

CHARACTERS_PER_TOKEN = 4.0
"""Rough average for English text, for an estimate where no tokenizer is given."""
_BATCH = 1000

CountTokens = Callable[[list[str]], Ints]
"""Returns the number of tokens of each text."""


class _Turn(msgspec.Struct):
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn]


def read_sharegpt(file: Path, tokenizer: Path | None, progress: Callable[[float], object]) -> Trace:
    """Reads a request per conversation: the prompt is its first turn and the output its second, as
    in the benchmark clients of SGLang and vLLM. Conversations with only one turn, or with an empty
    one, are skipped. ``tokenizer`` is a ``tokenizer.json`` or its folder; None estimates tokens
    from the number of characters. ``progress`` is called with the share of the file, 0 to 1, that
    was just read. Raises ConfigError."""
    count = _by_characters if tokenizer is None else _by_tokenizer(tokenizer)
    prompts, outputs = [], []
    items = _items(file)
    for first in range(0, len(items), _BATCH):
        batch = items[first : first + _BATCH]
        pairs = [pair for pair in _turns(file, first, batch) if all(pair)]
        if pairs:
            asked, answered = zip(*pairs, strict=True)
            prompts.append(count(list(asked)))
            outputs.append(count(list(answered)))
        progress(len(batch) / len(items))
    if not prompts:
        raise ConfigError(f"{file}: no conversation has a question and an answer")
    note = f"tokens are estimated at {CHARACTERS_PER_TOKEN:g} characters each"
    return Trace(
        prompt=np.concatenate(prompts),
        output=np.concatenate(outputs),
        notes=(note,) if tokenizer is None else (),
    )


def _items(file: Path) -> list[msgspec.Raw]:
    """The list's items, not decoded yet: each is read from the disk when it is used."""
    with file.open("rb") as stream:
        text = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return msgspec.json.decode(text, type=list[msgspec.Raw])
    except JSON_ERRORS as error:
        raise ConfigError(f"{file}: is not a JSON list of conversations: {error}") from None


def _turns(file: Path, first: int, items: list[msgspec.Raw]) -> Iterator[tuple[str, str]]:
    """Yields the first and second turn of each conversation that has two."""
    for number, item in enumerate(items, first):
        try:
            turns = msgspec.json.decode(item, type=_Conversation).conversations
        except JSON_ERRORS as error:
            raise ConfigError(f"{file}: item {number} of the list: {error}") from None
        if len(turns) >= 2:
            yield turns[0].value.strip(), turns[1].value.strip()


def _by_characters(texts: list[str]) -> Ints:
    lengths = np.fromiter(map(len, texts), dtype=np.int64)
    return np.maximum(1, np.rint(lengths / CHARACTERS_PER_TOKEN)).astype(np.int64)


def _by_tokenizer(path: Path) -> CountTokens:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"tokenizer {file} does not exist: it must be a tokenizer.json")
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"tokenizer {file} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: list[str]) -> Ints:
        encoded = tokenizer.encode_batch_fast(texts)
        return np.maximum(1, np.fromiter(map(len, encoded), dtype=np.int64))

    return count
