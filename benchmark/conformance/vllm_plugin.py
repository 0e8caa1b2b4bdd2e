"""A pytest plugin under which vLLM's tests of its server run over CrossPool servers.

vLLM is not installed for it. Its tests import a helper that starts servers, which is replaced, and
names of vLLM of which few do anything while they talk to a server: stand-ins take their place."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from benchmark.conformance.outcomes import add_options, set_up
from benchmark.conformance.servers import Asked, Servers

SERVED_BESIDE = "zephyr-lora"
"""The name of every server's second model. Some tests name it: an adapter's, with vLLM."""
PAGE_SIZE = 16
"""Tokens of a block of vLLM's cache."""
NEEDLESS = {
    "--dtype": 1,
    "--enforce-eager": 0,
    "--port": 1,
    "--enable-auto-tool-choice": 0,
    "--enable-chunked-prefill": 0,
    "--enable-lora": 0,
    "--gpu-memory-utilization": 1,
    "--lora-modules": 1,
    "--max-cpu-loras": 1,
    "--max-logprobs": 1,
    "--max-lora-rank": 1,
    "--max-num-batched-tokens": 1,
    "--no-enable-prefix-caching": 0,
    "--structured-outputs-config.backend": 1,
}
"""vLLM's flags of kernels and compilers, of what CrossPool always does and of adapters, and how
many values each has."""


class _StandIn(ModuleType):
    """A module of vLLM of which every name exists: capitalised ones are classes that cannot be
    made, others are modules. Called as a function it returns itself, which is false."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[0].isupper():
            value = _Absent(name, (Exception,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self

    def __bool__(self) -> bool:
        return False


class _Absent(type):
    """Metaclass of the stand-in's classes: whatever a test wants of one fails."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or name == "pytestmark":
            raise AttributeError(name)
        raise NotImplementedError(f"{cls.__qualname__}.{name} is vLLM's, which is not installed")

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError(f"{cls.__qualname__} is vLLM's, which is not installed")


class _Finder:
    """Finds vLLM's modules as stand-ins, and the package of its tests in a checkout."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name.partition(".")[0] == "vllm":
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm.version":
            module.__dict__["__version__"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.fixture
def sample_json_schema() -> dict[str, Any]:
    """A schema for tools, where vLLM's tests take one of their settings."""
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }


def pytest_configure(config: pytest.Config) -> None:
    servers = set_up(config, SERVED_BESIDE, NEEDLESS, PAGE_SIZE)
    checkout: Path = config.getoption("--conformance-checkout")
    sys.meta_path.append(_Finder())
    _give_tokenizer(config.getoption("--conformance-model"))
    tests = ModuleType("tests")
    tests.__path__ = [str(checkout / "tests")]
    helpers = ModuleType("tests.utils")
    helpers.__dict__.update(RemoteOpenAIServer=_remote(servers), ROCM_EXTRA_ARGS=[])
    sys.modules.update({"tests": tests, "tests.utils": helpers})


def _give_tokenizer(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizers: Any = importlib.import_module("vllm.tokenizers")
    tokenizers.get_tokenizer = lambda *_, **__: AutoTokenizer.from_pretrained(model)


def _remote(servers: Servers) -> type:
    class RemoteOpenAIServer:
        """What vLLM's tests use of its class of this name."""

        DUMMY_API_KEY = "token-abc123"

        def __init__(self, model: str, vllm_serve_args: Sequence[object], **more: object) -> None:
            del more
            words = list(vllm_serve_args)
            if "--served-model-name" in words:
                at = words.index("--served-model-name")
                model = str(words[at + 1])
                del words[at : at + 2]
            self._asked = Asked(model, tuple(words))
            servers.start(self._asked)

        def __enter__(self) -> RemoteOpenAIServer:
            return self

        def __exit__(self, *_: object) -> None:
            """The server stays for the next test that asks for the same."""

        @property
        def url_root(self) -> str:
            servers.start(self._asked)  # another may have been started since
            return servers.url

        def url_for(self, *parts: str) -> str:
            return "/".join((self.url_root, *parts))

        def get_client(self, **more: Any) -> openai.OpenAI:
            more.setdefault("timeout", 60)
            return openai.OpenAI(
                base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **more
            )

        def get_async_client(self, **more: Any) -> openai.AsyncOpenAI:
            more.setdefault("timeout", 60)
            return openai.AsyncOpenAI(
                base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **more
            )

        def get_async_client_anthropic(self, **more: Any) -> Any:
            import anthropic

            more.setdefault("timeout", 60)
            return anthropic.AsyncAnthropic(
                base_url=self.url_root, api_key=self.DUMMY_API_KEY, max_retries=0, **more
            )

    return RemoteOpenAIServer
