"""The folder of a GGUF model from which SGLang's front end reads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.frontend.model_folder import model_folder
from crosspool.frontend.server_args import server_args
from crosspool.frontend.tokenizer import load_tokenizer
from sglang.srt.configs.model_config import ModelConfig as SGLangModel
from support import gguf_files
from support.front_end import deployment
from support.server import DEMO

QWEN = DEMO / "tiny-qwen3-moe"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "made"
    return gguf_files.convert(QWEN, out, lambda name: "Q8_0")[0]


def served(file: Path, runtime_dir: Path, **sglang: Any) -> Deployment:
    models = {0: ModelConfig(name="a", path=str(file), sglang=sglang)}
    return deployment(models=models, next_model=1, runtime_dir=str(runtime_dir))


def test_a_checkpoint_s_own_folder_is_read(tmp_path: Path) -> None:
    assert model_folder(served(QWEN, tmp_path), 0) == QWEN
    assert not list(tmp_path.iterdir())


def test_processes_that_come_at_once_share_one_folder(file: Path, tmp_path: Path) -> None:
    fleet = served(file, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: model_folder(fleet, 0), range(8)))
    assert list(tmp_path.iterdir()) == [*folders]
    config = json.loads((folders.pop() / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and "gguf" not in config


def test_the_front_end_knows_the_model_as_it_was(file: Path, tmp_path: Path) -> None:
    fleet = served(file, tmp_path)
    found = SGLangModel.from_server_args(server_args(fleet, 0))
    original = SGLangModel.from_server_args(server_args(served(QWEN, tmp_path), 0))
    for field in ("context_len", "vocab_size", "hidden_size", "num_hidden_layers", "dtype"):
        assert getattr(found, field) == getattr(original, field), field
    assert found.hf_eos_token_id == original.hf_eos_token_id
    tokenizer, expected = load_tokenizer(fleet, 0), load_tokenizer(served(QWEN, tmp_path), 0)
    messages = [{"role": "user", "content": "What is a pool?"}]
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert tokenizer.apply_chat_template(messages) == expected.apply_chat_template(messages)


def test_another_tokenizer_goes_before_the_file_s(file: Path, tmp_path: Path) -> None:
    fleet = served(file, tmp_path, tokenizer_path=str(DEMO / "tiny-deepseek-v2"))
    assert not (model_folder(fleet, 0) / "tokenizer.json").exists()
    assert load_tokenizer(fleet, 0).bos_token == "<s>"
