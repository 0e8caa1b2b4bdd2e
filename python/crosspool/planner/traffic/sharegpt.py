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
ESTIMATED = f"tokens are estimated at {CHARACTERS_PER_TOKEN:g} characters each"
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
    count = token_counter(tokenizer)
    prompts, outputs = [], []
    for pairs in read_turns(file, progress):
        asked, answered = zip(*pairs, strict=True)
        prompts.append(count(list(asked)))
        outputs.append(count(list(answered)))
    return Trace(
        prompt=np.concatenate(prompts),
        output=np.concatenate(outputs),
        notes=(ESTIMATED,) if tokenizer is None else (),
    )


def read_turns(file: Path, progress: Callable[[float], object]) -> Iterator[list[tuple[str, str]]]:
    """Yields the first two turns of the conversations that have both, in batches of at least one.
    ``progress`` is called as :func:`read_sharegpt` does. Raises ConfigError, also when there are
    none."""
    items = _items(file)
    found = False
    for first in range(0, len(items), _BATCH):
        batch = items[first : first + _BATCH]
        pairs = [pair for pair in _turns(file, first, batch) if all(pair)]
        if pairs:
            found = True
            yield pairs
        progress(len(batch) / len(items))
    if not found:
        raise ConfigError(f"{file}: no conversation has a question and an answer")


def token_counter(tokenizer: Path | None) -> CountTokens:
    """Returns what counts tokens: the ``tokenizer``, which is a ``tokenizer.json`` or its folder,
    or an estimate by characters for None. Raises ConfigError."""
    return _by_characters if tokenizer is None else _by_tokenizer(tokenizer)


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
    tokenizer = load_tokenizer(path)

    def count(texts: list[str]) -> Ints:
        encoded = tokenizer.encode_batch_fast(texts)
        return np.maximum(1, np.fromiter(map(len, encoded), dtype=np.int64))

    return count


def load_tokenizer(path: Path) -> Any:
    """Returns the ``tokenizers.Tokenizer`` of a ``tokenizer.json`` or its folder, which neither
    truncates nor pads. Raises ConfigError."""
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
    return tokenizer
