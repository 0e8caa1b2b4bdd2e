"""What the scheduler process reads of a model: its shape, its tokenizer, and what compiles its
grammars."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.frontend.tokenizer import load_tokenizer, think_end
from crosspool.models.registry import spec_of
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.protocols import ModelTools
from crosspool.server.grammar_choice import compiler_of
from crosspool.server.grammar_library import GrammarCompiler, LaterCompiler
from crosspool.server.grammars import Grammars, ModelGrammars
from crosspool.server.text import HFTextDecoder
from crosspool.weightpool.experts import check_experts
from crosspool.weightpool.placement import place
from crosspool.weightpool.sleeping import check_loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadTools:
    """One model, as its files tell of it."""

    spec: ModelSpec
    decoder: HFTextDecoder
    compiler: GrammarCompiler
    think_end: tuple[int, ...]

    def with_grammars(self, grammars: Grammars, model: int) -> ModelTools:
        return ModelTools(
            spec=self.spec,
            decoder=self.decoder,
            grammars=ModelGrammars(grammars, model),
            think_end=self.think_end,
        )


def read_tools(deployment: Deployment, model: int, *, compiles_later: bool = False) -> ReadTools:
    """Reads a model of the deployment; what compiles its grammars is made with the first of them
    if it ``compiles_later``. Raises ConfigError when the model or its tokenizer cannot be read."""
    spec = spec_of(deployment.models[model])
    tokenizer = load_tokenizer(deployment, model)
    make = partial(_compiler, deployment, tokenizer, spec)
    return ReadTools(
        spec=spec,
        decoder=HFTextDecoder(tokenizer),
        compiler=LaterCompiler(make) if compiles_later else make(),
        think_end=think_end(deployment, model, tokenizer),
    )


def read_all(
    deployment: Deployment, *, leaves_out: bool
) -> tuple[Deployment, dict[int, ReadTools]]:
    """Reads all models of the deployment. If it ``leaves_out``, those that cannot be read leave the
    deployment that is returned; else ConfigError is raised."""
    read: dict[int, ReadTools] = {}
    for number, config in deployment.models.items():
        try:
            read[number] = _read(deployment, number)
        except ConfigError as error:
            if not leaves_out:
                raise
            log.error("model %s cannot be served any more: %s", config.name, error)
            deployment = deployment.without_model(number)
    return deployment, read


def read_compiler(deployment: Deployment, model: int) -> GrammarCompiler:
    """Reads what compiles the grammars of a model. Raises ConfigError as :func:`read_tools`
    does."""
    spec = spec_of(deployment.models[model])
    return _compiler(deployment, load_tokenizer(deployment, model), spec)


def read_further(deployment: Deployment, model: int, others: Mapping[int, ModelSpec]) -> ReadTools:
    """Reads a model that is to be served beside the ``others`` of the deployment. Raises
    ConfigError when it cannot be read, when its weights never fit into the pools, or its experts
    into the expert pool, and when no model can be loaded here."""
    read = _read(deployment, model, compiles_later=True)
    specs = {**others, model: read.spec}
    placement = place(deployment, specs)
    check_experts(deployment, specs, placement)
    check_loading(deployment, placement)
    return read


def _read(deployment: Deployment, model: int, *, compiles_later: bool = False) -> ReadTools:
    """Raises ConfigError, whatever a library finds wrong with a user's files."""
    try:
        return read_tools(deployment, model, compiles_later=compiles_later)
    except ConfigError:
        raise
    except Exception as error:
        name = deployment.models[model].name
        raise ConfigError(f"{name}: its tokenizer cannot be used: {error!r}") from error


def _compiler(
    deployment: Deployment, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec
) -> GrammarCompiler:
    arguments = deployment.sglang
    make = compiler_of(arguments.get("grammar_backend", "xgrammar"))
    any_whitespace = not arguments.get("constrained_json_disable_any_whitespace", False)
    return make(tokenizer, spec, any_whitespace=any_whitespace)
