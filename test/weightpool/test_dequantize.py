"""Quantised matrices are read as the format's own rule, or its own library, means them; whole and
in parts that begin and end anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.models.schemes import AWQ, GPTQ, MXFP4, ROUNDED, Elements, PackedWords, Scheme, Stack
from crosspool.models.spec import TensorRef
from crosspool.weightpool.checkpoint import Checkpoint
from safetensors.torch import save_file
from support import quantized
from support.quantized import Written
from torch import Tensor

N, K = 48, 128
GROUP = {"num_bits": 4, "strategy": "group", "group_size": 32}
CASES: dict[str, tuple[Scheme, Callable[[Tensor], Written]]] = {
    "gptq": (GPTQ(bits=4, block=(1, 32)), quantized.gptq),
    "gptq 8 bits": (GPTQ(bits=8, block=(1, 32)), lambda w: quantized.gptq(w, bits=8)),
    "gptq whole rows": (GPTQ(bits=4, block=(1, None)), lambda w: quantized.gptq(w, group=-1)),
    "gptq v2": (
        GPTQ(bits=4, block=(1, 32), zeros_less_one=False),
        lambda w: quantized.gptq(w, v2=True),
    ),
    "gptq desc_act": (
        GPTQ(bits=4, block=(1, 32), act_order=True),
        lambda w: quantized.gptq(w, desc_act=True),
    ),
    "awq": (AWQ(bits=4, block=(1, 32)), quantized.awq),
    "fp8 block": (
        Elements(values="fp8", block=(32, 32), scales=("weight_scale_inv",)),
        quantized.fp8_block,
    ),
    "fp8 block at borders": (
        Elements(values="fp8", block=(20, 20), scales=("weight_scale_inv",)),
        lambda w: quantized.fp8_block(w, block=20),
    ),
    "fp8 tensor": (Elements(values="fp8", block=(None, None)), quantized.fp8_tensor),
    "compressed fp8 tensor": (
        Elements(values="fp8", block=(None, None)),
        lambda w: quantized.compressed(w, "float-quantized", num_bits=8, type="float"),
    ),
    "compressed fp8 channel": (
        Elements(values="fp8", block=(1, None)),
        lambda w: quantized.compressed(
            w, "float-quantized", num_bits=8, type="float", strategy="channel"
        ),
    ),
    "compressed fp8 block": (
        Elements(values="fp8", block=(16, 32)),
        lambda w: quantized.compressed(
            w,
            "float-quantized",
            num_bits=8,
            type="float",
            strategy="block",
            block_structure=[16, 32],
        ),
    ),
    "compressed int8 channel": (
        Elements(values="int8", block=(1, None)),
        lambda w: quantized.compressed(w, "int-quantized", num_bits=8, strategy="channel"),
    ),
    "compressed int8 asymmetric": (
        Elements(values="int8", block=(1, None), symmetric=False),
        lambda w: quantized.compressed(
            w, "int-quantized", num_bits=8, strategy="channel", symmetric=False
        ),
    ),
    "compressed int4": (
        PackedWords(bits=4, block=(1, 32)),
        lambda w: quantized.compressed(w, "pack-quantized", **GROUP),
    ),
    "compressed int4 asymmetric": (
        PackedWords(bits=4, block=(1, 32), symmetric=False),
        lambda w: quantized.compressed(w, "pack-quantized", symmetric=False, **GROUP),
    ),
    "compressed int4 actorder": (
        PackedWords(bits=4, block=(1, 32), act_order=True),
        lambda w: quantized.compressed(w, "pack-quantized", actorder="group", **GROUP),
    ),
    "compressed int8 channel packed": (
        PackedWords(bits=8, block=(1, None)),
        lambda w: quantized.compressed(w, "pack-quantized", num_bits=8, strategy="channel"),
    ),
    "compressed mxfp4": (
        MXFP4(),
        lambda w: quantized.compressed(
            w,
            "mxfp4-pack-quantized",
            num_bits=4,
            type="float",
            strategy="group",
            group_size=32,
            scale_dtype=torch.uint8,
        ),
    ),
}
PARTS = ((slice(0, N), slice(0, K)), (slice(16, 48), slice(32, 96)), (slice(5, 23), slice(41, 102)))


def _ref(scheme: Scheme, stack: Stack | None = None) -> TensorRef:
    name = "experts.down_proj" if stack else "m.weight"
    return TensorRef(key="m", name=name, shape=(N, K), scheme=scheme, stack=stack)


def _weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05


def _read(folder: Path, ref: TensorRef, parts: tuple[tuple[slice, slice], ...]) -> list[Tensor]:
    checkpoint = Checkpoint(folder)
    checkpoint.check([ref])
    found = dict(checkpoint.stream([(ref, part) for part in parts]))
    return [found[i] for i in range(len(parts))]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_format_means(case: str, tmp_path: Path) -> None:
    scheme, write = CASES[case]
    tensors, expected = write(_weight())
    assert (expected - _weight()).abs().max() < 0.04  # else the writer would be wrong
    save_file({f"m.{name}": t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    for part, found in zip(PARTS, _read(tmp_path, _ref(scheme), PARTS), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[part], atol=1e-7, rtol=1e-6)


def _largest_errors(values: str, weight: Tensor) -> Tensor:
    """Half of the steps between the values of a format, for every weight; for int4 a whole one,
    since zero points are rounded, too, and the least or the largest value may be cut off."""
    if values == "int4":
        groups = weight.view(N, K // 32, 32)
        steps = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15
        return steps.repeat_interleave(32, 1)
    scale = weight.abs().amax(1, keepdim=True)
    if values == "int8":
        return (scale / 127 / 2).expand_as(weight)
    # Three bits of mantissa, and the step of the least exponent.
    return torch.maximum(weight.abs() / 16, scale / 448 * 2**-10)


@pytest.mark.parametrize("values", ROUNDED)
def test_floats_are_rounded_to_the_nearest(values: str, tmp_path: Path) -> None:
    weight = _weight()
    weight[3], weight[7, 40:50] = 0, weight[7, 40:50].abs()
    save_file({"m.weight": weight}, tmp_path / "model.safetensors")
    whole, *parts = _read(tmp_path, _ref(ROUNDED[values]), PARTS)
    assert ((whole - weight).abs() <= 1.001 * _largest_errors(values, weight)).all()
    if values == "int4":
        assert ((whole - weight).abs() > _largest_errors(values, weight) / 2).float().mean() < 0.1
    assert (whole[3] == 0).all() and not torch.equal(whole, weight)
    for part, found in zip(PARTS[1:], parts, strict=True):
        assert torch.equal(found, whole[part])


@pytest.mark.parametrize(("first", "step"), [(0, 1), (1, 2)])
def test_mxfp4_of_all_experts_in_one_tensor(first: int, step: int, tmp_path: Path) -> None:
    """gpt-oss's layout: blocks [experts, rows, groups, 16], gate and up in alternating rows."""
    written = [quantized.mxfp4(_weight() * (1 + i)) for i in range(3 * step)]
    blocks = torch.stack([blocks for blocks, _, _ in written]).unflatten(0, (3, step))
    scales = torch.stack([scales for _, scales, _ in written]).unflatten(0, (3, step))
    save_file(
        {
            "experts.down_proj_blocks": blocks.transpose(1, 2).flatten(1, 2).contiguous(),
            "experts.down_proj_scales": scales.transpose(1, 2).flatten(1, 2).contiguous(),
        },
        tmp_path / "model.safetensors",
    )
    stack = Stack(index=2, count=3, height=N * step, first=first, step=step)
    expected = written[2 * step + first][2]
    for part, found in zip(PARTS, _read(tmp_path, _ref(MXFP4(), stack), PARTS), strict=True):
        torch.testing.assert_close(found, expected[part], atol=0, rtol=0)


def test_tensors_of_a_matrix_in_different_files(tmp_path: Path) -> None:
    tensors, expected = quantized.awq(_weight())
    files = {f"m.{name}": f"{name}.safetensors" for name in tensors}
    for name, tensor in tensors.items():
        save_file({f"m.{name}": tensor}, tmp_path / files[f"m.{name}"])
    index = json.dumps({"weight_map": files})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    ref = _ref(CASES["awq"][0])
    (found,) = _read(tmp_path, ref, PARTS[:1])
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    assert {file for file, *_ in Checkpoint(tmp_path).identity([ref])} == set(files.values())


def test_a_tensor_of_a_matrix_is_wrong_or_missing(tmp_path: Path) -> None:
    tensors, _ = quantized.awq(_weight())
    ref = _ref(CASES["awq"][0])

    def message(**changed: Tensor | None) -> str:
        written = {f"m.{n}": t for n, t in (tensors | changed).items() if t is not None}
        save_file(written, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError) as error:
            Checkpoint(tmp_path).check([ref])
        return str(error.value)

    assert "tensor m.scales has shape [2, 48], config.json asks for [4, 48]" in message(
        scales=tensors["scales"][:2].contiguous()
    )
    assert "no tensor m.qzeros, which m has as int4 of config.json" in message(qzeros=None)
    assert "tensor m.qweight is F32, it must be one of I32" in message(
        qweight=tensors["qweight"].float()
    )
    said = message(qweight=None, qzeros=None, scales=None, weight=_weight())
    assert "no tensor m.qweight, but m.weight: name m in config.json" in said


def test_a_quantised_matrix_that_the_config_does_not_name(tmp_path: Path) -> None:
    tensors, _ = quantized.awq(_weight())
    save_file({f"m.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    plain = TensorRef(key="m", name="m.weight", shape=(N, K))
    with pytest.raises(ConfigError, match=r"no tensor m\.weight, but m\.qweight: config\.json"):
        Checkpoint(tmp_path).check([plain])
