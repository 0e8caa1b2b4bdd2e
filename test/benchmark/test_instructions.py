"""Instruction counts are compared with the record."""

from __future__ import annotations

from benchmark.instructions import compare


def test_growth_beyond_the_tolerance_is_named() -> None:
    recorded = {"gemm": 1000, "moe": 1000, "decode": 1000}
    counts = {"gemm": 1030, "moe": 1031, "decode": 500}
    assert compare(counts, recorded, 0.03) == ["moe"]


def test_a_case_without_record_is_named() -> None:
    assert compare({"gemm": 1}, {}, 0.03) == ["gemm"]
