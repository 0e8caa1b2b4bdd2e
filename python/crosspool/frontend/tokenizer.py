"""Models' tokenizers, loaded as SGLang loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.frontend.model_folder import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def think_end(
    deployment: Deployment, number: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The tokens with which model ``number`` ends its thinking; none without a reasoning parser.

    Raises ConfigError when SGLang has no such parser."""
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    model = deployment.models[number]
    name = {**deployment.sglang, **model.sglang}.get("reasoning_parser")
    if not name:
        return ()
    try:
        parser = ReasoningParser(model_type=name, stream_reasoning=False, tokenizer=tokenizer)
    except ValueError as error:
        raise ConfigError(f"{model.name}: --reasoning-parser {name}: {error}") from None
    return tuple(parser.detector.get_think_end_token_ids(tokenizer))


def load_tokenizer(deployment: Deployment, number: int) -> PreTrainedTokenizerBase:
    """The tokenizer of model ``number``, as SGLang's tokenizer manager would load it, with other
    models that have the same one.

    Raises ConfigError when its folder has none."""
    from crosspool.frontend.shared_tokenizers import get_tokenizer

    model = deployment.models[number]
    arguments: dict[str, Any] = {**deployment.sglang, **model.sglang}
    path = arguments.get("tokenizer_path") or str(model_folder(deployment, number))
    try:
        tokenizer = get_tokenizer(
            path,
            tokenizer_mode=arguments.get("tokenizer_mode", "auto"),
            trust_remote_code=arguments.get("trust_remote_code", False),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model.name}: no tokenizer can be loaded from {path}: {error}"
        ) from error
    return tokenizer
