"""Turns the vocabulary of a GGUF file into the tokenizer.json and tokenizer_config.json of
``tokenizers`` and transformers.

A GGUF file has tokens, their kinds, and merges or scores, but only the name of the rule by which
text is cut before the merges (``tokenizer.ggml.pre``). The rules here are those of the tokenizers
after which llama.cpp named them.
"""

from __future__ import annotations

from typing import Any

from crosspool.config.errors import ConfigError
from crosspool.models.gguf_header import GGUFHeader

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Kinds of tokens. Control and user-defined ones are found in text before it is cut."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}DIGITS"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_SINGLE_DIGITS, _THREE_DIGITS = _WORDS.replace("DIGITS", ""), _WORDS.replace("DIGITS", "{1,3}")
_DEEPSEEK_3 = (
    "\\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)
_DEEPSEEK_LLM = (
    "[\\r\\n]",
    # Letters of scripts that have cases; Georgian's small letters had none when it was made.
    "\\s?(?:(?![\u10d0-\u10ff])[\\p{Lu}\\p{Ll}\\p{Lt}])+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    "\\p{N}",
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LARGE, _SMALL = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_O200K = (
    f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_LARGE}*{_SMALL}+{_CONTRACTIONS}"
    f"|[^\\r\\n\\p{{L}}\\p{{N}}]?{_LARGE}+{_SMALL}*{_CONTRACTIONS}"
    "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_STARCODER = (
    "\\p{N}",
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
)
_GPT2: tuple[str, ...] = ()
"""The rule that byte-level tokenizers have of themselves."""
_RULES = {
    "qwen2": (_SINGLE_DIGITS,),
    "llama-bpe": (_THREE_DIGITS,),
    "chatglm-bpe": (_THREE_DIGITS,),
    "glm4": (_THREE_DIGITS,),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-v3": _DEEPSEEK_3,
    "gpt-4o": (_O200K,),
    "refact": _STARCODER,
    "starcoder": _STARCODER,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
}
"""How text is cut, by ``tokenizer.ggml.pre``."""


class GGUFTokenizer:
    """The tokenizer of a GGUF file."""

    def __init__(self, header: GGUFHeader) -> None:
        """Raises ConfigError when the file has none, or one of a kind that is not supported."""
        self._header = header
        self._tokens: list[str] = self._get("tokens", [])
        self._kinds: list[int] = self._get("token_type", [])
        model = self._get("model")
        if not self._tokens or len(self._kinds) != len(self._tokens):
            raise self._error("tokens", "are missing, or have no types")
        if model not in ("gpt2", "llama"):
            raise self._error("model", "supported are gpt2 and llama", model)
        self._pieces = model == "llama"
        rule = self._get("pre", "default")
        if not self._pieces and rule not in _RULES:
            raise self._error("pre", f"supported are {', '.join(sorted(_RULES))}", rule)
        self._rule = _RULES.get(rule, _GPT2)

    def tokenizer_json(self) -> dict[str, Any]:
        """Returns what tokenizer.json holds."""
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": number,
                    "content": self._tokens[number],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": kind == _CONTROL,
                }
                for number, kind in enumerate(self._kinds)
                if kind in (_CONTROL, _USER_DEFINED)
            ],
            "normalizer": None,
            "post_processor": self._post_processor(),
            **(self._piece_parts() if self._pieces else self._byte_parts()),
        }

    def config(self) -> dict[str, Any]:
        """Returns what tokenizer_config.json holds."""
        named = {
            f"{role}_token": self._token(f"{key}_token_id")
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "unk_token": self._token("unknown_token_id"),
            **named,
            "chat_template": self._header.metadata.get("tokenizer.chat_template"),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _byte_parts(self) -> dict[str, Any]:
        cuts = [
            {
                "type": "Split",
                "pattern": {"Regex": rule},
                "behavior": "Isolated",
                "invert": False,
            }
            for rule in self._rule
        ]
        # No merge makes a control token, so it does no harm that the vocabulary has it.
        return {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [*cuts, _byte_level(use_regex=not cuts)],
            },
            "decoder": _byte_level(use_regex=True),
            "model": self._model(self._get("merges", []), byte_fallback=False),
        }

    def _piece_parts(self) -> dict[str, Any]:
        prefix = self._get("add_space_prefix", True)
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": _SPACE,
                "prepend_scheme": "first" if prefix else "never",
                "split": False,
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._model(self._merges_of_scores(), byte_fallback=True),
        }

    def _model(self, merges: list[str], byte_fallback: bool) -> dict[str, Any]:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": byte_fallback,
            "byte_fallback": byte_fallback,
            "ignore_merges": self._get("pre") == "llama-bpe",
            "vocab": {token: number for number, token in enumerate(self._tokens)},
            "merges": merges,
        }

    def _merges_of_scores(self) -> list[str]:
        """The pairs that make each piece, the likeliest piece first, as sentencepiece merges."""
        scores: list[float] = self._get("scores", [])
        if len(scores) != len(self._tokens):
            raise self._error("scores", "are missing")
        numbers = {token: number for number, token in enumerate(self._tokens)}
        merges = []
        for token, score, kind in zip(self._tokens, scores, self._kinds, strict=True):
            for cut in range(1, len(token) if kind == _NORMAL else 0):
                left, right = token[:cut], token[cut:]
                if left in numbers and right in numbers:
                    merges.append((-score, numbers[left], numbers[right], f"{left} {right}"))
        merges.sort()
        return [merge for *_, merge in merges]

    def _post_processor(self) -> dict[str, Any] | None:
        first = self._get("add_bos_token", self._pieces) and self._token("bos_token_id")
        last = self._get("add_eos_token", False) and self._token("eos_token_id")
        if not first and not last:
            return None
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*text, {"Sequence": {"id": "B", "type_id": 1}}]

        def around(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
            before = [{"SpecialToken": {"id": first, "type_id": 0}}] if first else []
            after = [{"SpecialToken": {"id": last, "type_id": 0}}] if last else []
            return [*before, *parts, *after]

        added = {token: self._tokens.index(token) for token in (first, last) if token}
        return {
            "type": "TemplateProcessing",
            "single": around(text),
            "pair": around(pair),
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]}
                for token, number in added.items()
            },
        }

    def _token(self, key: str) -> str | None:
        number = self._get(key)
        if number is None:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self._tokens):
            raise self._error(key, f"there are {len(self._tokens)} tokens", number)
        return self._tokens[number]

    def _get(self, key: str, default: Any = None) -> Any:
        return self._header.metadata.get(f"tokenizer.ggml.{key}", default)

    def _error(self, key: str, why: str, value: Any = None) -> ConfigError:
        found = "" if value is None else f"={value!r}"
        return ConfigError(
            f"{self._header.files[0]}: tokenizer.ggml.{key}{found}: {why}: name a folder with the "
            "model's tokenizer with --tokenizer-path"
        )


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
