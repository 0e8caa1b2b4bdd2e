"""Checkpoints that are found in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from crosspool.config import deployment_file
from crosspool.config.errors import ConfigError
from crosspool.config.flags import parse
from crosspool.config.options import Options
from make_random_checkpoint import make_random_checkpoint
from support import gguf_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for name, kind in (
        ("qwen", "Qwen3MoeForCausalLM"),
        ("org/mixtral", "MixtralForCausalLM"),
        ("bert", "BertModel"),
        ("qwen/inner/deep", "Qwen3MoeForCausalLM"),
    ):
        path = root / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"architectures": [kind]}))
    (root / "notes").mkdir()
    return root


def named(options: Options) -> dict[str | None, str]:
    return {model.name: model.path for model in options.models}


def test_every_checkpoint_that_can_be_served_is_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(["--models-dir", str(folder), "--dtype", "float32", "--keep", "asleep"])
    assert named(options) == {
        "org/mixtral": str(folder / "org/mixtral"),
        "qwen": str(folder / "qwen"),
    }
    assert {(model.dtype, model.keep) for model in options.models} == {("float32", "asleep")}
    left_out = f"{folder / 'bert'} is left out: ['BertModel'] is not supported"
    assert left_out in capsys.readouterr().err


def test_gguf_files_are_found(folder: Path) -> None:
    sizes = {"vocab_size": 160}
    path = make_random_checkpoint("olmoe", folder.parent / "random", sizes, "float32")
    made = folder.parent / "made"
    gguf_files.convert(path, made, lambda name: "Q8_0", max_tensors=20)
    parts = sorted(made.glob("*.gguf"))
    assert len(parts) > 1
    for part in parts:
        shutil.copy(part, folder / "org" / part.name)
    whole, _ = gguf_files.convert(path, folder.parent / "whole", lambda name: "Q8_0")
    shutil.copy(whole, folder / "one.gguf")
    found = named(parse(["--models-dir", str(folder)]))
    first = parts[0].name
    assert found == {
        "one": str(folder / "one.gguf"),
        "org/mixtral": str(folder / "org/mixtral"),
        f"org/{first.removesuffix('.gguf')}": str(folder / "org" / first),
        "qwen": str(folder / "qwen"),
    }


def test_models_that_are_named_come_first_and_once(folder: Path) -> None:
    words = ["--models-dir", str(folder), "--model-path", f"{folder}/qwen"]
    options = parse([*words, "--served-model-name", "q", "--priority", "3"])
    assert list(named(options)) == ["q", "org/mixtral"]
    assert [model.priority for model in options.models] == [3, 3]
    words += ["--model-path", "/other"]
    options = parse([*words, "--priority", "3", "--priority", "4"])
    assert [model.priority for model in options.models] == [3, 4, 0]
    with pytest.raises(ConfigError, match="--priority is given 3 times for 2 models"):
        parse([*words, *["--priority", "3"] * 3])


def test_the_file_names_a_folder_relative_to_itself(folder: Path) -> None:
    file = folder.parent / "deployment.yaml"
    file.write_text("models_dir: models\nmodels: [{path: models/qwen, keep: pinned}]")
    options = deployment_file.read(file)
    assert [(m.name, m.keep) for m in options.models] == [
        (None, "pinned"),
        ("org/mixtral", "demand"),
    ]
    file.write_text("models_dir: models")
    assert list(named(deployment_file.read(file))) == ["org/mixtral", "qwen"]


def test_a_folder_without_models_is_a_mistake(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        parse(["--models-dir", str(folder / "nowhere")])
    with pytest.raises(ConfigError, match="no folder in it has a model that can be served"):
        parse(["--models-dir", str(folder / "notes")])
    (folder / "qwen/config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"qwen/config\.json is not valid JSON"):
        parse(["--models-dir", str(folder)])
