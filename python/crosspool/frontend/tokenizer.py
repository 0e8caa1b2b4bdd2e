"""Models' tokenizers, loaded as SGLang loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crosspool.config.deployment import ConfigError, Deployment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(deployment: Deployment, index: int) -> PreTrainedTokenizerBase:
    """The tokenizer of model ``index``, as SGLang's tokenizer manager would load it.

    Raises ConfigError when its folder has none."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    model = deployment.models[index]
    arguments: dict[str, Any] = {**deployment.sglang, **model.sglang}
    path = arguments.get("tokenizer_path") or model.path
    try:
        tokenizer: PreTrainedTokenizerBase = get_tokenizer(
            path,
            tokenizer_mode=arguments.get("tokenizer_mode", "auto"),
            trust_remote_code=arguments.get("trust_remote_code", False),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model.name}: no tokenizer can be loaded from {path}: {error}"
        ) from error
    return tokenizer
