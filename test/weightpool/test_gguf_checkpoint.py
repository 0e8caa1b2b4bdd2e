"""GGUF files: headers that are read in time, parts of tensors, and clear errors."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.models.gguf_config import config_of
from crosspool.models.gguf_header import gguf_files, read_header
from crosspool.models.registry import (
    FAMILIES,
    attention_tensors,
    ffn_tensors,
    read_model,
    read_spec,
)
from crosspool.models.spec import GQASpec, ModelSpec, TensorRef
from crosspool.weightpool.checkpoint import Checkpoint
from crosspool.weightpool.gguf_checkpoint import open_checkpoint
from gguf import GGMLQuantizationType as Type
from make_random_checkpoint import make_random_checkpoint
from safetensors.torch import load_file
from support import gguf_files as made


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("gguf")
    path = make_random_checkpoint("mixtral", out / "random", {}, "float32")
    return made.convert(path, out / "made", lambda name: "Q4_0")


def _refs(spec: ModelSpec) -> list[TensorRef]:
    refs = [ref for _, ref in attention_tensors(spec)]
    return refs + [ref for layer in range(spec.layers) for ref in ffn_tensors(spec, layer)]


def test_parts_of_tensors(paths: tuple[Path, Path]) -> None:
    """Any rows and columns, of rows that llama.cpp has in another order and of stacked experts."""
    path, floats = paths
    refs = [ref for ref in _refs(read_model(path)) if len(ref.shape) == 2]
    expected = load_file(floats / "model.safetensors")
    checkpoint = open_checkpoint(path)
    types = checkpoint.check(refs)
    assert types["model.layers.0.self_attn.q_proj.weight"] == "Q4_0"
    assert types["model.layers.0.block_sparse_moe.gate.weight"] == "F32"
    index = (slice(5, 27), slice(3, 45))
    parts = [(ref, (slice(0, min(27, ref.shape[0])), slice(3, 45))) for ref in refs]
    parts += [(ref, index) for ref in refs if ref.shape[0] > 27]
    for number, part in checkpoint.stream(parts):
        ref, cut = parts[number]
        torch.testing.assert_close(part, expected[ref.name][cut], atol=0, rtol=0)


def test_spec_of_the_metadata(paths: tuple[Path, Path]) -> None:
    path, floats = paths
    spec, expected = read_model(path), read_model(floats)
    assert spec.cut_unit == 32
    assert spec.dtype == "bfloat16"
    assert isinstance(spec.attention, GQASpec)
    for field in ("family", "hidden", "vocab", "context", "norm_eps", "attention", "ffn"):
        assert getattr(spec, field) == getattr(expected, field), field
    assert (spec.tied_embeddings, spec.eos_token_ids) == (False, expected.eos_token_ids)


def test_folders_and_splits(paths: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(paths[0], tmp_path / "one.gguf")
    assert gguf_files(tmp_path) == (tmp_path / "one.gguf",)
    shutil.copy(paths[0], tmp_path / "two.gguf")
    with pytest.raises(ConfigError, match=r"2 GGUF models, one\.gguf and two\.gguf among them"):
        gguf_files(tmp_path)
    first = tmp_path / "x-00001-of-00002.gguf"
    shutil.copy(paths[0], first)
    with pytest.raises(ConfigError, match=r"x-00002-of-00002\.gguf is missing: x-00001"):
        gguf_files(first)
    assert gguf_files(paths[1]) == ()
    assert type(open_checkpoint(paths[1])) is Checkpoint


def test_identity_changes_with_the_file(paths: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copy(paths[0], copy)
    refs = _refs(read_model(copy))
    before = open_checkpoint(copy).identity(refs)
    assert [name for name, *_ in before] == ["model.gguf"]
    copy.touch()
    assert open_checkpoint(copy).identity(refs) != before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-100], "is truncated: it has"),
        (lambda data: data[:300], "ends within its header"),
        (lambda data: b"", "cannot be read"),
        (lambda data: b"GGML" + data[4:], "is no GGUF file: it begins with b'GGML'"),
        (lambda data: data[:4] + b"\x09" + data[5:], "GGUF version 9 is not supported"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "ends within its header, or"),
    ],
)
def test_broken_files_are_told(
    damage: Callable[[bytes], bytes], said: str, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(paths[0].read_bytes()))
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"broken\.gguf") as error:
        read_model(broken)
    assert said in str(error.value)
    assert time.process_time() - began < 1


def _write(path: Path, architecture: str, tensors: dict[str, tuple[Any, Type]]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"general\.architecture='gemma3' is not supported; sup"):
        read_model(_write(tmp_path / "a.gguf", "gemma3", {}))
    frequencies = {"rope_freqs.weight": (np.ones(32, np.float16), Type.F16)}
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is F16, it must be F32"):
        read_model(_write(tmp_path / "b.gguf", "llama", frequencies))
    codes = np.zeros((16, 66), np.uint8)
    path = _write(tmp_path / "c.gguf", "qwen3moe", {"token_embd.weight": (codes, Type.IQ2_XXS)})
    checkpoint = open_checkpoint(path)
    ref = TensorRef(key="embed", name="model.embed_tokens.weight", shape=(16, 256))
    with pytest.raises(ConfigError, match=r"token_embd\.weight is IQ2_XXS, it must be one of F32"):
        checkpoint.check([ref])
    with pytest.raises(ConfigError, match=r"shape \[16, 256\], its metadata asks for \[32, 256\]"):
        checkpoint.check([TensorRef(key="embed", name=ref.name, shape=(32, 256))])
    norm = TensorRef(key="final_norm", name="model.norm.weight", shape=(256,))
    with pytest.raises(ConfigError, match=r"c\.gguf: the file has no tensor output_norm\.weight"):
        checkpoint.check([norm])


def test_divisors_of_rotations_fit_the_head(tmp_path: Path) -> None:
    path = make_random_checkpoint("llama", tmp_path / "random", {"num_hidden_layers": 1}, "float32")
    file, _ = made.convert(path, tmp_path / "made", lambda name: "Q8_0")
    assert "rope_scaling" not in config_of(file).values
    divisors = {"rope_freqs.weight": (np.arange(1, 8, dtype=np.float32), Type.F32)}
    config = config_of(file)
    config.values["rope_scaling"] = config_of(
        _write(tmp_path / "d.gguf", "llama", divisors)
    ).values["rope_scaling"]
    assert config.values["rope_scaling"]["divisors"] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ConfigError, match=r"rope_scaling\.divisors must list 8 numbers"):
        read_spec(config, FAMILIES["llama"], "float32")


def test_a_large_vocabulary_is_read_in_time(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "qwen3moe")
    writer.add_token_list([f"token {i}" for i in range(150_000)])
    writer.add_token_merges([f"a{i} b{i}" for i in range(150_000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    began = time.process_time()
    header = read_header((tmp_path / "v.gguf",))
    assert time.process_time() - began < 2  # the gguf package's own reader: 5 s
    assert header.metadata["tokenizer.ggml.tokens"][149_999] == "token 149999"
