"""Recipes of the tiny models, bundled and other: shapes, texts and tokenizers."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tiny_corpus import CHATML_TEMPLATE, TOOLS_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import generate_merges

VOCAB_SIZE = 2048
MAX_POSITIONS = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Recipe:
    """One model: its shape, its text, and how it is trained."""

    name: str
    config_class: str
    layout: str
    source: str
    source_text: str
    characters: int
    shape: dict[str, Any]
    sentencepiece: bool = False
    tools: bool = False
    peak_lr: float = 3e-3
    bundled: bool = True


COMMON_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.04,
}
MLA_SHAPE: dict[str, Any] = COMMON_SHAPE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "tie_word_embeddings": False,
}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="tiny-qwen3-moe",
            config_class="Qwen3MoeConfig",
            layout="grouped-query attention with query and key norms, tied embeddings",
            source="language-reference",
            source_text="the Python language reference (`pydoc_data.topics`), PSF License",
            characters=170_000,
            tools=True,
            shape=COMMON_SHAPE
            | {
                "num_key_value_heads": 2,
                "head_dim": 64,
                "num_experts": 8,
                "moe_intermediate_size": 128,
                "norm_topk_prob": True,
                "tie_word_embeddings": True,
            },
        ),
        Recipe(
            name="wide-qwen3-moe",
            config_class="Qwen3MoeConfig",
            layout="that of tiny-qwen3-moe, in widths that llama.cpp's types of 256 weights divide",
            source="language-reference",
            source_text="the Python language reference (`pydoc_data.topics`), PSF License",
            characters=170_000,
            tools=True,
            peak_lr=2e-3,
            bundled=False,
            shape=COMMON_SHAPE
            | {
                "hidden_size": 256,
                "intermediate_size": 768,
                "num_key_value_heads": 4,
                "head_dim": 64,
                "num_experts": 8,
                "moe_intermediate_size": 256,
                "norm_topk_prob": True,
                "tie_word_embeddings": False,
            },
        ),
        Recipe(
            name="tiny-deepseek-v2",
            config_class="DeepseekV2Config",
            layout="multi-head latent attention (MLA) as in DeepSeek-V2-Lite, two shared experts, "
            "first layer dense",
            source="licences",
            source_text="free software licences (`/usr/share/common-licenses` of Debian and "
            "Python's own), texts that are passed on verbatim",
            characters=150_000,
            sentencepiece=True,
            shape=MLA_SHAPE
            | {
                "q_lora_rank": None,
                "n_shared_experts": 2,
                "norm_topk_prob": False,
                "topk_method": "greedy",
                "scoring_func": "softmax",
                "routed_scaling_factor": 1.0,
            },
        ),
        Recipe(
            name="tiny-glm4-moe-lite",
            config_class="Glm4MoeLiteConfig",
            layout="multi-head latent attention (MLA) with low-rank queries as in GLM-4.7-Flash, "
            "sigmoid router with correction bias, one shared expert, first layer dense",
            source="docstrings",
            source_text="docstrings of the Python standard library, PSF License",
            characters=170_000,
            shape=MLA_SHAPE
            | {
                "q_lora_rank": 96,
                "n_shared_experts": 1,
                "norm_topk_prob": True,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "routed_scaling_factor": 1.8,
                "num_nextn_predict_layers": 0,
            },
        ),
    )
}


def build_tokenizer(recipe: Recipe, texts: list[str], out: Path) -> PreTrainedTokenizerBase:
    """Trains the tokenizer on ``texts``, writes it to ``out`` and loads it as a server would."""
    out.mkdir(parents=True, exist_ok=True)
    if recipe.sentencepiece:
        tokenizer = _train_sentencepiece(texts, out)
    else:
        tokenizer = _train_byte_level_bpe(texts)
    tokenizer.chat_template = TOOLS_TEMPLATE if recipe.tools else CHATML_TEMPLATE
    tokenizer.save_pretrained(out)
    settings = {
        **SPECIAL_TOKENS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "clean_up_tokenization_spaces": False,
    }
    if recipe.sentencepiece:
        settings |= {"tokenizer_class": "LlamaTokenizer", "unk_token": tokenizer.unk_token}
        settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    # Written here because what transformers 5 writes cannot be read by older versions.
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(out)


SPECIAL_TOKENS: dict[str, Any] = {
    "eos_token": TURN_END,
    "pad_token": END_OF_TEXT,
    "additional_special_tokens": [TURN_START],
    "model_max_length": MAX_POSITIONS,
}


def _train_byte_level_bpe(texts: list[str]) -> PreTrainedTokenizerBase:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL_TOKENS)


def _train_sentencepiece(texts: list[str], out: Path) -> PreTrainedTokenizerBase:
    """Writes ``tokenizer.model`` and returns the same model as a tokenizer of transformers."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        control_symbols=[END_OF_TEXT, TURN_START, TURN_END],
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    return LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab), add_bos_token=True, **SPECIAL_TOKENS
    )
