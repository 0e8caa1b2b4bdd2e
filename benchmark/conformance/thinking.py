"""A bundled model that thinks: a copy whose tokenizer has the tokens around a thought."""

from __future__ import annotations

import json
from pathlib import Path

_TOKENIZER = "tokenizer.json"
_BECOMES = {"Ġrele": "<think>", "Ġthe": "</think>"}
"""Tokens of the bundled tokenizer whose ids are given away. The model writes ` the` in nearly every
sentence, and so it ends its thoughts; it hardly ever writes the other."""


def make(model: Path, folder: Path) -> Path:
    """Write a copy of ``model``, whose tokenizer is a byte-level BPE, into ``folder``; return the
    copy's folder. Its weights are the same: the ids of two tokens mean others."""
    copy = folder / f"{model.name}-thinking"
    copy.mkdir()
    for file in model.iterdir():
        if file.name != _TOKENIZER:
            (copy / file.name).symlink_to(file.resolve())
    tokenizer = json.loads((model / _TOKENIZER).read_text())
    bpe = tokenizer["model"]
    # What is no token any more is neither made of others nor part of others.
    bpe["merges"] = [
        merge for merge in bpe["merges"] if not {*merge, "".join(merge)} & _BECOMES.keys()
    ]
    bpe["vocab"] = {_BECOMES.get(text, text): number for text, number in bpe["vocab"].items()}
    for text in _BECOMES.values():
        tokenizer["added_tokens"].append({
            "id": bpe["vocab"][text],
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        })  # fmt: skip
    tokenizer["added_tokens"].sort(key=lambda token: int(token["id"]))
    (copy / _TOKENIZER).write_text(json.dumps(tokenizer))
    return copy
