"""Bad input: a clear error each time, and the server alive."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import warm, warm_launcher
from support.server import DEMO, TINY_MODELS, Server

MODEL = TINY_MODELS[0]


@pytest.fixture(autouse=True)
def still_alive(server: Server) -> Any:
    yield
    status, answer = server.post(
        "/v1/completions",
        {"model": MODEL, "prompt": "The import", "max_tokens": 4, "temperature": 0},
    )
    assert status == 200 and answer["choices"][0]["text"]


def completion(**extra: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "The import", "max_tokens": 4, **extra}


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/v1/completions", completion(model="gpt-17"), 404, "gpt-17"),
        ("/v1/completions", completion(prompt="word " * 9000), 400, "context"),
        ("/v1/completions", completion(max_tokens=-3), 400, "max_"),
        ("/v1/completions", completion(temperature=-1), 400, "temperature"),
        ("/v1/completions", completion(top_p=3), 400, "top_p"),
        ("/v1/completions", completion(regex="[a-"), 400, "regex"),
        ("/v1/completions", completion(ebnf="root ::= nothing"), 400, "ebnf"),
        (f"/m/{MODEL}/generate", {"input_ids": [10**9]}, 400, "vocab"),
        ("/v1/completions", b'{"model": "tiny', 400, "json"),
        ("/v1/completions", b"[1, 2]", 400, ""),
        ("/v1/chat/completions", {"model": MODEL}, 400, "messages"),
        (f"/m/{MODEL}/generate", {"sampling_params": {"max_new_tokens": -1}}, 400, ""),
    ],
)
def test_bad_request(server: Server, path: str, body: Any, status: int, word: str) -> None:
    code, answer = server.post(path, body, timeout=60)
    assert code == status, answer
    assert word.lower() in json.dumps(answer).lower()
    assert "Traceback" not in json.dumps(answer)


def launch(*flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher (:mod:`support.warm_launcher`) to its end."""
    with tempfile.NamedTemporaryFile(mode="r") as log:
        words = ["--port", "0", *flags]
        process = warm.start([warm.TORCH, warm.SGLANG], warm_launcher.launch, Path(log.name), words)
        status = process.wait(300)
        return subprocess.CompletedProcess(words, status, stdout=log.read(), stderr="")


def refused(run: subprocess.CompletedProcess[str], *words: str) -> None:
    said = run.stdout + run.stderr
    assert run.returncode == 2, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, (word, said)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / MODEL, tmp_path / "model"))


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.1" in n and "experts" in n)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(launch("--model-path", str(checkpoint)), name)


def test_an_unsupported_architecture_is_named(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config.update(architectures=["MambaForCausalLM"], model_type="mamba")
    path.write_text(json.dumps(config))
    refused(launch("--model-path", str(checkpoint)), "MambaForCausalLM", "Qwen3MoeForCausalLM")


def test_a_pool_too_small_for_one_request_is_refused() -> None:
    model = str(DEMO / MODEL)
    refused(launch("--model-path", model, "--kv-pool-bytes", "2MiB"), "kv-pool-bytes")


def test_a_weight_pool_too_small_is_refused() -> None:
    model = str(DEMO / MODEL)
    refused(launch("--model-path", model, "--weight-pool-bytes", "1MiB"), "weight")


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crosspool.launch_server", "--port", "0"]
    run = subprocess.run(
        [*command, "--model-path", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    refused(run, "nowhere")


def refused_at_once(run: subprocess.CompletedProcess[str], *words: str) -> None:
    """Refused before any process was started."""
    refused(run, *words)
    assert "starting on" not in run.stdout and "importing SGLang" not in run.stdout


def test_a_missing_chat_template_is_named() -> None:
    run = launch("--model-path", str(DEMO / MODEL), "--chat-template", "/no/where.jinja")
    refused_at_once(run, f"chat_template of {MODEL}: '/no/where.jinja' is neither a file")


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_broken_tokenizer_is_named(checkpoint: Path, content: str | None) -> None:
    file = checkpoint / "tokenizer.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    said = f"{checkpoint} has neither tokenizer.json" if content is None else f"{file} is no"
    refused_at_once(launch("--model-path", str(checkpoint)), f"tokenizer of model: {said}")


def test_a_prompt_chunk_must_be_whole_pages() -> None:
    run = launch("--model-path", str(DEMO / MODEL), "--chunked-prefill-size", "40")
    refused_at_once(run, "chunked_prefill_size: 40 must be a multiple of page_size, 16: give 32")


def test_the_largest_body_must_fit_beside_no_other() -> None:
    run = launch("--model-path", str(DEMO / MODEL), "--max-total-body-bytes", "4MiB")
    said = "max_total_body_bytes: 4194304 bytes must not be less than max_body_bytes, 8388608"
    refused_at_once(run, said)


def test_a_tmpdir_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/self")
    run = launch("--model-path", str(DEMO / MODEL))
    refused_at_once(run, "the server's files cannot be made in /proc/self")
