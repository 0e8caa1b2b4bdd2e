"""Tokenizers made of what GGUF files keep of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from crosspool.config.errors import ConfigError
from crosspool.models.gguf_header import GGUFHeader, read_header
from crosspool.models.gguf_tokenizer import GGUFTokenizer
from support import gguf_files
from support.prompts import sentences
from support.server import DEMO
from tokenizers import Tokenizer

TEXTS = [
    *sentences(20),
    "",
    " two  spaces\n\n\tand a tab, 12345 digits; it's  ",
    "naïve Übergröße \u65e5\u672c\u8a9e \U0001f600 \u0627\u0644\u0639",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
]


def made_of(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = GGUFTokenizer(GGUFHeader((Path("a.gguf"),), metadata, {}))
    return Tokenizer.from_str(json.dumps(tokenizer.tokenizer_json()))


def words(pre: str) -> dict[str, Any]:
    """A vocabulary of bytes, so that what is cut apart stays apart, and one token of a word."""
    letters = "".join(map(chr, range(33, 127))) + "\u0120\u010a"
    tokens = list(letters)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [],
    }


@pytest.mark.parametrize("model", ["tiny-qwen3-moe", "tiny-deepseek-v2"])
def test_text_becomes_the_tokens_of_the_original(model: str, tmp_path: Path) -> None:
    """One that merges bytes, and one of sentencepiece."""
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    gguf_files.add_tokenizer(writer, DEMO / model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFTokenizer(read_header((file,)))
    tokenizer = Tokenizer.from_str(json.dumps(found.tokenizer_json()))
    original = Tokenizer.from_file(str(DEMO / model / "tokenizer.json"))
    for text in TEXTS:
        for special in (True, False):
            ids = original.encode(text, add_special_tokens=special).ids
            assert tokenizer.encode(text, add_special_tokens=special).ids == ids, text
            assert tokenizer.decode(ids) == original.decode(ids)
    settings = json.loads((DEMO / model / "tokenizer_config.json").read_text())
    config = found.config()
    for role in ("bos_token", "pad_token"):
        assert config.get(role) == settings[role]
    assert config["chat_template"] == (DEMO / model / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("qwen2", "it's 12 abc.\n\n  x", ["it", "'s", " ", "1", "2", " abc", ".\n\n", " ", " x"]),
        ("glm4", "1234 a!b", ["123", "4", " a", "!b"]),
        ("llama-bpe", "I'LL 1234", ["I", "'LL", " ", "123", "4"]),
        ("deepseek-v3", "1234 a!b", ["123", "4", " a", "!b"]),
        ("deepseek-llm", "ab 12\nc!", ["ab", " ", "1", "2", "\n", "c", "!"]),
        ("gpt-4o", "I'LL seeHer 1234", ["I'LL", " see", "Her", " ", "123", "4"]),
        ("gpt-4o", "a //\n", ["a", " //\n"]),
        ("refact", "it's 12 a!", ["it", "'s", " ", "1", "2", " a", "!"]),
        ("gpt-2", "it's 123 a!", ["it", "'s", " 123", " a", "!"]),
    ],
)
def test_text_is_cut_by_the_rule_that_the_file_names(pre: str, text: str, parts: list[str]) -> None:
    tokenizer = made_of(words(pre))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in cut] == parts


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pre": "jais"}, r"tokenizer\.ggml\.pre='jais': supported are .*qwen2.*--tokenizer-path"),
        ({"model": "rwkv"}, r"tokenizer\.ggml\.model='rwkv': supported are gpt2 and llama"),
        ({"token_type": []}, r"tokenizer\.ggml\.tokens: are missing, or have no types"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores: are missing"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], problem: str) -> None:
    changes = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ConfigError, match=problem):
        made_of(words("qwen2") | changes)


def test_a_token_of_control_is_found_in_text_and_made_by_no_merge() -> None:
    """Pieces of control have the best score; a merge of them would be made first."""
    tokens = ["<unk>", "<s>", "<s", ">", "<", "s", "\u2581"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = made_of(metadata)
    assert "<s >" not in json.loads(tokenizer.to_str())["model"]["merges"]
    assert tokenizer.encode("<s>").tokens[-1] == "<s>"
