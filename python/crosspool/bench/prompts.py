"""Prompts of a wanted length.

With the model's tokenizer they are token ids, or the text of such ids where a server takes only
text. Without one they are words, each of which is about a token to the tokenizers of large models;
the server's count is what counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.sharegpt import load_tokenizer

Prompt = str | list[int]
"""A text, or token ids."""

_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more
if out so up said what its about than into them can only other time new some could these two may
first then do any like my now over such our man me even most made after also did many off before
must well back through years much where your way down should because long each just state people
those too mr how little good world make very year still see own work men day get here old life
both between being under three never know same last another while us might great go come since
against right came take used himself few house use place during high without again home around
small however found part school every thought went say general once upon war left number course
water less public put until always away far going night set began nothing better why enough head
almost end early side though something knew order second
"""
WORDS = tuple(_TEXT.split())
"""Common English words."""


class PromptWriter(Protocol):
    """Writes prompts, no two of which begin alike."""

    def write(self, tokens: int) -> Prompt:
        """Returns a prompt of about ``tokens`` tokens."""
        ...


class WordWriter:
    """Writes common English words in random order."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def write(self, tokens: int) -> str:
        return " ".join(WORDS[place] for place in self._rng.integers(0, len(WORDS), tokens))


class TokenWriter:
    """Writes random ordinary tokens of a tokenizer: none that is special or was added to its
    vocabulary."""

    def __init__(self, tokenizer: Path, rng: np.random.Generator, *, as_text: bool) -> None:
        """``tokenizer`` is a ``tokenizer.json`` or its folder. ``as_text``: whether prompts are the
        text of the tokens, which may be read back as some more or fewer of them. Raises
        ConfigError."""
        self._tokenizer = load_tokenizer(tokenizer)
        vocabulary = set(self._tokenizer.get_vocab(with_added_tokens=False).values())
        ordinary = sorted(vocabulary - set(self._tokenizer.get_added_tokens_decoder()))
        if not ordinary:
            raise ConfigError(f"tokenizer {tokenizer}: its vocabulary is empty")
        self._ordinary = np.array(ordinary)
        self._rng = rng
        self._as_text = as_text

    def write(self, tokens: int) -> Prompt:
        drawn: list[int] = self._rng.choice(self._ordinary, tokens).tolist()
        return str(self._tokenizer.decode(drawn)) if self._as_text else drawn
