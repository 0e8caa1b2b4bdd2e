"""Writes quantised matrices by the rules of each format's own tools, as a checkpoint holds them.

Nothing here comes from the reader. Values of compressed-tensors are written by that library; the
others follow, value by value, what AutoAWQ, GPTQModel, transformers and the OCP specification say.
Every writer returns the tensors by the ends of their names, and the weights that they stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]


def gptq(
    weight: Tensor, *, bits: int = 4, group: int = 32, desc_act: bool = False, v2: bool = False
) -> Written:
    """GPTQModel's ``pack_original`` with asymmetric zero points; ``gptq`` (not ``gptq_v2``) takes
    one from every packed word's values when it is saved."""
    n, k = weight.shape
    group = k if group == -1 else group
    groups = torch.arange(k) // group
    if desc_act:
        groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    top = (1 << bits) - 1
    scales, zeros = torch.empty(k // group, n), torch.empty(k // group, n, dtype=torch.int64)
    codes = torch.empty(n, k, dtype=torch.int64)
    expected = torch.empty(n, k)
    for g in range(k // group):
        mine = weight[:, groups == g]
        low, high = mine.amin(1).clamp(max=0), mine.amax(1).clamp(min=0)
        scales[g] = ((high - low) / top).half().float()
        zeros[g] = (-low / scales[g]).round().clamp(1, top).long()
        q = (mine / scales[g][:, None] + zeros[g][:, None]).round().clamp(0, top).long()
        codes[:, groups == g] = q
        expected[:, groups == g] = (q - zeros[g][:, None]).float() * scales[g][:, None]
    per = 32 // bits
    qweight, qzeros = torch.zeros(k // per, n).long(), torch.zeros(k // group, n // per).long()
    for i in range(k):
        qweight[i // per] |= codes[:, i] << (bits * (i % per))
    for o in range(n):
        qzeros[:, o // per] |= zeros[:, o] << (bits * (o % per))
    if not v2:
        qzeros -= sum(1 << (bits * i) for i in range(per))
    return {
        "qweight": _word(qweight),
        "qzeros": _word(qzeros),
        "scales": scales.half(),
        "g_idx": groups.int(),
    }, expected


def awq(weight: Tensor, *, group: int = 32) -> Written:
    """AutoAWQ's ``pseudo_quantize_tensor`` and ``WQLinear_GEMM.from_linear``."""
    n, k = weight.shape
    grouped = weight.view(n, k // group, group)
    high, low = grouped.amax(2), grouped.amin(2)
    scales = ((high - low).clamp(min=1e-5) / 15).half()
    zeros = (-torch.round(low / scales)).clamp(0, 15)
    every = scales.float().repeat_interleave(group, 1), zeros.repeat_interleave(group, 1)
    codes = (torch.round(weight / every[0]) + every[1]).clamp(0, 15).int()
    expected = (codes - every[1]) * every[0]
    packed = []
    for values in (codes.T, zeros.T.int()):
        words = torch.zeros(values.shape[0], n // 8).long()
        for column in range(n // 8):
            for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, column] |= values[:, column * 8 + place].long() << (i * 4)
        packed.append(_word(words))
    return {"qweight": packed[0], "qzeros": packed[1], "scales": scales.T.contiguous()}, expected


def fp8_block(weight: Tensor, *, block: int = 32, scale: str = "weight_scale_inv") -> Written:
    """DeepSeek-V3's blocks, which are cut off at the borders of the matrix."""
    n, k = weight.shape
    stored = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-n // block), -(-k // block))
    expected = torch.empty(n, k)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            at = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
            scales[r, c] = weight[at].abs().amax() / 448
            stored[at] = (weight[at] / scales[r, c]).to(torch.float8_e4m3fn)
            expected[at] = stored[at].float() * scales[r, c]
    return {"weight": stored, scale: scales}, expected


def fp8_tensor(weight: Tensor) -> Written:
    """One scale for the matrix, as a tensor without dimensions."""
    scale = weight.abs().amax() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of 32 by the OCP specification: bytes [n, k / 32, 16], exponents [n, k / 32], and
    weights."""
    n, k = weight.shape
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grouped = weight.view(n, k // 32, 32)
    exponents = grouped.abs().amax(2).log2().floor().long() - 2
    scaled = grouped / 2.0 ** exponents[:, :, None]
    codes = (scaled.abs().clamp(max=6)[..., None] - values).abs().argmin(3)
    expected = values[codes] * scaled.sign() * 2.0 ** exponents[:, :, None]
    codes += (scaled < 0).long() * 8
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8), (exponents + 127).to(torch.uint8), expected.view(n, k)


def compressed(weight: Tensor, format_: str, **args: Any) -> Written:
    """compressed-tensors' own compressor, and what the library itself makes of the result."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    weights = scheme.weights
    assert weights is not None
    state: dict[str, Tensor] = {"weight": weight.clone()}
    n, k = weight.shape
    strategy = weights.strategy
    if strategy == "group":
        size = weights.group_size or k
        order = torch.arange(k)
        if weights.actorder == "group":
            order = torch.randperm(k, generator=torch.Generator().manual_seed(2))
            state["weight_g_idx"] = (order // size).int()
            order = torch.argsort(order // size, stable=True)
        grouped = weight[:, order].view(n, k // size, size)
        low, high = grouped.amin(2), grouped.amax(2)
    elif strategy == "block":
        rows, columns = weights.block_structure or (n, k)
        grouped = weight.view(n // rows, rows, k // columns, columns)
        low, high = grouped.amin((1, 3)), grouped.amax((1, 3))
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.amin().view(1), weight.amax().view(1)
    state["weight_scale"], state["weight_zero_point"] = calculate_qparams(low, high, weights)
    if weights.num_bits == 4 and weights.type == "float":
        state["weight_scale"] = 2.0 ** (torch.log2(high.abs().maximum(low.abs())).floor() - 2)
    compressor = BaseCompressor.get_value_from_registry(format_)
    written = compressor.compress(state, scheme)
    expected: Tensor = compressor.decompress(dict(written), scheme)["weight"]
    written.pop("weight_zero_point", None) if weights.symmetric else None
    return {name: tensor.contiguous() for name, tensor in written.items()}, expected.float()


def quantize_checkpoint(
    path: Path,
    out: Path,
    write: Callable[[Tensor], Written],
    config: dict[str, Any],
    plain: Collection[str] = ("embed_tokens", "lm_head", "gate"),
) -> tuple[Path, Path]:
    """Writes two checkpoints from one of floats in one file: with its matrices quantised, and with
    the floats that these stand for. ``config``: the former's ``quantization_config``. ``plain``:
    last parts of the names of modules that stay as they are."""
    stored, floats = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or module.rpartition(".")[2] in plain:
            stored[name] = floats[name] = tensor
            continue
        written, floats[name] = write(tensor.float())
        stored |= {f"{module}.{ending}": one for ending, one in written.items()}
    return _write_both(path, out, stored, floats, config)


def quantize_gpt_oss(path: Path, out: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """The same for gpt-oss, whose experts are MXFP4 as OpenAI publishes them: the rows of all
    experts' transposed matrices in blocks."""
    stored, floats = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if tensor.dim() != 3:
            stored[name] = floats[name] = tensor
            continue
        written = [mxfp4(of_expert.t().contiguous()) for of_expert in tensor.float()]
        blocks, scales, values = (torch.stack(parts) for parts in zip(*written, strict=True))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = values.transpose(1, 2)
    return _write_both(path, out, stored, floats, config)


def _write_both(
    path: Path,
    out: Path,
    stored: dict[str, Tensor],
    floats: dict[str, Tensor],
    config: dict[str, Any],
) -> tuple[Path, Path]:
    folders = out / "quantized", out / "floats"
    for folder, tensors in zip(folders, (stored, floats), strict=True):
        shutil.copytree(path, folder)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    file = folders[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return folders


def _word(values: Tensor) -> Tensor:
    """Words of 32 bits, whatever their sign."""
    wrapped = values & 0xFFFFFFFF
    return torch.where(wrapped >= 1 << 31, wrapped - (1 << 32), wrapped).int()
