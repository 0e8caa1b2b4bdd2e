"""A pytest plugin under which SGLang's tests run over CrossPool servers.

It replaces what SGLang's tests import from ``sglang.test.test_utils`` and ``sglang.srt.utils``
before any of them is imported: starting a server, ending one, loading a tokenizer by its name."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from crosspool.frontend import compat

from benchmark.conformance.outcomes import add_options, set_up
from benchmark.conformance.servers import Asked, Servers

SERVED_BESIDE = "meta-llama/Llama-3.1-8B-Instruct"
"""The name of every server's second model. Some tests name it without having asked for it."""
NEEDLESS = {
    "--attention-backend": 1,
    "--sampling-backend": 1,
    "--cuda-graph-bs-decode": 1,
    "--cuda-graph-max-bs-decode": 1,
    "--disable-cuda-graph": 0,
    "--decode-log-interval": 1,
}
"""SGLang's flags of kernels and of a log that CrossPool does not write, and how many values each
has."""
PAGE_SIZE = 1
"""Tokens of a page of SGLang's cache, unless it is told another number."""
ALONE = "test_model_list"
"""The name of tests that want one model to be listed."""
THINKS = "Qwen/Qwen3-30B-A3B"
"""The name of a model whose thoughts a test counts."""
PROGRAMS = "test_programs.py"
"""The file of the DSL's programs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.fixture
def check_answer() -> bool:
    """What the DSL's programs are asked with: whether an answer must be true. A tiny model's never
    is."""
    return False


def pytest_configure(config: pytest.Config) -> None:
    servers = set_up(config, SERVED_BESIDE, NEEDLESS, PAGE_SIZE)
    compat.install()
    _load_tokenizers_from(config.getoption("--conformance-model"), servers)
    _run_over(servers, config.getoption("--conformance-checkout"))
    config.pluginmanager.register(_Around(servers), "conformance-around")


class _Around:
    """Gives the DSL's programs, which have no server of their own, one as default backend, and some
    tests a server of a single model."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    @pytest.hookimpl(trylast=True)  # after the test's class has started its server
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.name == ALONE:
            self._servers.make_alone(True)
        if item.path.name == PROGRAMS:
            import sglang

            sglang.set_default_backend(endpoint(self._servers, SERVED_BESIDE))

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Have a server go on that a failed test has left paused, and have two models again."""
        import requests

        if item.name == ALONE:
            self._servers.make_alone(False)
        if "pause" in item.name:
            requests.post(f"{self._servers.url}/continue_generation", json={}, timeout=30)


def endpoint(servers: Servers, model: str) -> Any:
    """Return the DSL's backend for a server whose first model is called ``model``."""
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    servers.start(Asked(model))
    backend = RuntimeEndpoint(servers.url)
    backend.shutdown = lambda: None
    return backend


def _load_tokenizers_from(model: Path, servers: Servers) -> None:
    """Have every name of a tokenizer that is no folder mean that of ``model``, or of its copy that
    thinks."""
    import transformers
    from sglang.srt.utils import hf_transformers_utils

    def folder(name: Any) -> str:
        if Path(str(name)).is_dir():
            return str(name)
        return str(servers.thinking_folder if name == THINKS else model)

    def local(load: Callable[..., Any]) -> Callable[..., Any]:
        return lambda name, *words, **more: load(folder(name), *words, **more)

    hf_transformers_utils.get_tokenizer = local(hf_transformers_utils.get_tokenizer)
    automatic: Any = transformers.AutoTokenizer
    automatic.from_pretrained = local(automatic.from_pretrained)


def _give_admin_key(servers: Servers) -> None:
    """Have the tests' requests carry the admin key where they carry none: their servers ask for
    no key, also on routes that change a server's state."""
    import requests

    send: Any = requests.Session.send

    def with_key(self: Any, request: Any, **more: Any) -> Any:
        if request.url.startswith(servers.url) and servers.admin_key is not None:
            request.headers.setdefault("Authorization", f"Bearer {servers.admin_key}")
        return send(self, request, **more)

    session: Any = requests.Session
    session.send = with_key


def _run_over(servers: Servers, checkout: Path) -> None:
    import sglang.test
    from sglang.srt import utils

    # Helpers of tests that the installed SGLang does not have.
    sglang.test.__path__.append(str(checkout / "python" / "sglang" / "test"))
    from sglang.lang.backend import runtime_endpoint
    from sglang.test import test_utils

    _give_admin_key(servers)
    runtime_endpoint.Runtime = lambda model_path: endpoint(servers, model_path)
    kill = utils.kill_process_tree

    def popen_launch_server(
        model: str,
        *words: object,
        api_key: str | None = None,
        other_args: Sequence[object] | None = None,
        return_stdout_stderr: tuple[IO[str], IO[str]] | None = None,
        **more: object,
    ) -> subprocess.Popen[bytes]:
        del words, more
        asked = Asked(model, tuple(other_args or ()), api_key)
        return servers.start(asked, return_stdout_stderr or ())

    def kill_process_tree(pid: int, *words: Any, **more: Any) -> None:
        if not servers.owns(pid):  # ours stays for the next test that asks for the same
            kill(pid, *words, **more)

    # Tests of SGLang's own front end in Rust, which CrossPool does not run.
    test_utils.is_rust_server_built = lambda: False
    test_utils.DEFAULT_URL_FOR_TEST = servers.url
    test_utils.popen_launch_server = popen_launch_server
    test_utils.kill_process_tree = kill_process_tree
    utils.kill_process_tree = kill_process_tree
