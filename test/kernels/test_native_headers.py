"""Structures, enumerators and constants that Python mirrors are those of the CPU's headers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from crosspool.kernels import engine_structs as es
from crosspool.kernels import native, network
from crosspool.kernels import native_structs as ns
from crosspool.kernels.isa import ISAS
from support import kernel_structs as ks
from support.headers import COMPILER, assert_holds, same_functions, same_layout

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

HEADERS = (
    "cpu/engine/engine.h",
    "cpu/links/face.h",
    "cpu/kernels/attention_plan.h",
    "crosspool/virtual_memory.h",
)
RENAMED = {es.NativeLinkCounters: "LinkCounters", es.NativeExpertCounters: "ExpertCounters"}
NUMBERS = {
    "DType::kBFloat16": ns.BFLOAT16,
    "DType::kFloat32": ns.FLOAT32,
    "Encoding::kPlain": ns.PLAIN,
    "Encoding::kCompact": ns.COMPACT,
    "Encoding::kGrouped": ns.GROUPED,
    "Codes::kInt4": ns.CODES["int4"],
    "Codes::kUInt4": ns.CODES["uint4"],
    "Codes::kE2M1": ns.CODES["e2m1"],
    "Codes::kInt8": ns.CODES["int8"],
    "Codes::kE4M3": ns.CODES["e4m3"],
    "Codes::kInt6": ns.CODES["int6"],
    "Codes::kUInt6": ns.CODES["uint6"],
    "Offset::kNone": ns.OFFSETS["none"],
    "Offset::kMinimum": ns.OFFSETS["minimum"],
    "Offset::kZeroPoint": ns.OFFSETS["zero point"],
    "ScaleType::kFloat16": ns.SCALE_TYPES["float16"],
    "ScaleType::kBFloat16": ns.SCALE_TYPES["bfloat16"],
    "ScaleType::kFloat32": ns.SCALE_TYPES["float32"],
    "Score::kSoftmax": ns.SCORES["softmax"],
    "Score::kSigmoid": ns.SCORES["sigmoid"],
    "GroupScore::kMax": ns.GROUP_SCORES["max"],
    "GroupScore::kTop2Sum": ns.GROUP_SCORES["top2_sum"],
    "QKNorm::kNone": ns.QK_NORMS["none"],
    "QKNorm::kHead": ns.QK_NORMS["head"],
    "QKNorm::kFull": ns.QK_NORMS["full"],
    "Isa::kPortable": ISAS.index("portable"),
    "Isa::kAvx2": ISAS.index("avx2"),
    "Isa::kAvx512": ISAS.index("avx512"),
    "Isa::kAmx": ISAS.index("amx"),
    "Isa::kNeon": ISAS.index("neon"),
    "Isa::kNeonBf16": ISAS.index("neon_bf16"),
    "AttentionKind::kGQA": es.GQA,
    "AttentionKind::kMLA": es.MLA,
    "Choice::kGreedy": es.GREEDY,
    "Choice::kDraw": es.DRAW,
    "Choice::kHost": es.HOST,
    "CommandKind::kStep": es.STEP,
    "CommandKind::kResume": es.RESUME,
    "CommandKind::kRecall": es.RECALL,
    "CommandKind::kClose": es.CLOSE,
    "CommandKind::kAdd": es.ADD,
    "CommandKind::kRemove": es.REMOVE,
    "EventKind::kDone": es.DONE,
    "EventKind::kLogits": es.LOGITS,
    "EventKind::kTokens": es.TOKENS,
    "EventKind::kFailed": es.FAILED,
    "EventKind::kRefused": es.REFUSED,
    "EventKind::kClosed": es.CLOSED,
    "EventKind::kAdded": es.ADDED,
    "EventKind::kRemoved": es.REMOVED,
    "Weights::kHere": es.HERE,
    "Weights::kLater": es.LATER,
    "Weights::kNever": es.NEVER,
    "LinkEnd::kAttention": network.ATTENTION,
    "LinkEnd::kFFN": network.FFN,
    **{f"LossReason::k{reason.name.title()}": reason.value for reason in network.LossReason},
    "kPanel": ns.PANEL,
    "kDepth": ns.DEPTH,
    "CROSSPOOL_ABI_VERSION": native.ABI_VERSION,
}


def mirrors() -> list[type[ctypes.Structure]]:
    found = {
        one
        for module in (ns, es, ks, network)
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, ctypes.Structure)
    }
    return sorted(found, key=lambda one: one.__name__)


def test_every_field_lies_where_the_header_has_it(tmp_path: Path) -> None:
    assert len(mirrors()) == 45 and set(es.MIRRORED) < set(mirrors())
    claims = []
    for mirror in mirrors():
        claims += same_layout(mirror, RENAMED.get(mirror))
    assert_holds(claims, tmp_path, *HEADERS)


def test_numbers_are_the_headers(tmp_path: Path) -> None:
    claims = [
        f"static_assert(static_cast<int>({name}) == {value});" for name, value in NUMBERS.items()
    ]
    assert_holds(claims, tmp_path, *HEADERS)


def test_functions_take_and_return_what_python_says(tmp_path: Path) -> None:
    signatures = native._SIGNATURES | es.SIGNATURES | ks.SIGNATURES | network.SIGNATURES
    assert len(signatures) > 25
    assert_holds(same_functions(signatures), tmp_path, *HEADERS)


class _Swapped(ctypes.Structure):
    _fields_ = (("dim", ctypes.c_int32), ("cos", ctypes.c_void_p))


class _Narrower(ctypes.Structure):
    _fields_ = (
        ("top_p", ctypes.c_float),
        ("_padding", ctypes.c_float),
        *ns.SamplingRule._fields_[1:],
    )


class _TakesAnother(ctypes.Structure):
    _fields_ = (
        *ks.Kernels._fields_[:-1],
        ("sample", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)),
    )


class _WithoutTheLast(ctypes.Structure):
    _fields_ = (*es.Keep._fields_[:1], ("_padding", ctypes.c_int32))


@pytest.mark.parametrize(
    ("mirror", "name", "said"),
    [
        (_Swapped, "Rope", "offsetof"),
        (_Narrower, "SamplingRule", "sizeof"),
        (_WithoutTheLast, "Keep", "decomposes into 2 elements|1 name"),
        (_TakesAnother, "Kernels", r"is\(.*sample"),
    ],
)
def test_a_mirror_of_something_else_is_found(
    mirror: type[ctypes.Structure], name: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_holds(same_layout(mirror, name), tmp_path, "cpu/engine/tables.h")
