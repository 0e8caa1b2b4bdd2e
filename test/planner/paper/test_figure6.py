"""Compares parallelism, bytes by device and Figure 6 with the paper's own numbers."""

import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.devices.parallelism import Room, parallelism, room, served
from crosspool.planner.devices.systems import (
    DEVICE_RESERVE,
    WEIGHT_DEVICE_RESERVE,
    EqualDevices,
    crosspool,
    monolithic,
)
from crosspool.planner.paper import figure6 as f
from crosspool.planner.shapes import catalogue


@pytest.mark.parametrize(
    ("attention", "kv_heads", "ranks", "type_", "share"),
    [
        ("mha", 32, 4, "I", 1),
        ("gqa", 4, 4, "I", 1),
        ("gqa", 2, 4, "II", 1 / 2),
        ("mqa", 1, 4, "II", 1 / 4),
        ("mla", 1, 4, "II", 1 / 4),
        ("mla", 1, 1, "I", 1),
        ("gqa", 8, 5, "I", 8 / 10),
        ("gqa", 2, 5, "II", 2 / 5),
    ],
)
def test_what_one_request_sees(
    attention: str, kv_heads: int, ranks: int, type_: str, share: float
) -> None:
    found = parallelism(attention, kv_heads, ranks)
    assert (found.type, found.share) == (type_, pytest.approx(share))
    assert found.reason


@pytest.mark.parametrize(("kv_heads", "ranks"), [(1, 4), (2, 4), (4, 4), (8, 5), (2, 5)])
def test_room_is_the_share_of_equal_ranks(kv_heads: int, ranks: int) -> None:
    way = parallelism("gqa", kv_heads, ranks)
    found = room([1000] * ranks, way)
    assert found.longest(1) == pytest.approx(way.share * ranks * 1000)
    assert len(found.groups) == way.groups


def test_the_fullest_rank_of_a_group_counts() -> None:
    assert room([10, 4, 8, 8], parallelism("gqa", 2, 4)).groups == (8, 16)
    assert room([10, -4], served(2)).groups == (10, 0)
    assert Room(groups=(10, 7)).requests(4) == 3


def test_bytes_on_a_device_by_hand() -> None:
    glm = catalogue.load("GLM-4.7-Flash")
    devices = EqualDevices(count=2, bytes=40 * 10**9, reserve=0.2)
    own = glm.attention_bytes - glm.embedding_bytes
    held = (glm.ffn_bytes + glm.embedding_bytes) // 2 + own
    assert monolithic([glm], [(0, 1)], devices).free == (32 * 10**9 - held,) * 2
    assert crosspool([glm], 2, devices).free == (32 * 10**9 - glm.attention_bytes,) * 2


def test_the_papers_cliffs() -> None:
    found = f.reserves_with_the_papers_cliffs()
    assert found is not None
    assert found[0] <= DEVICE_RESERVE <= found[1]
    figure = f.figure6()
    assert f.cliff(figure, "G", "kvcached") == 16 << 10
    assert f.cliff(figure, "G", "static") == 16 << 10
    assert f.cliff(figure, "G", "crosspool") is None
    assert all(min(free) > 0 for free in figure.free.values())
    ffn = sum(catalogue.load(name).ffn_bytes for name in f.MODELS.values()) / 4
    assert ffn <= f.DEVICE_BYTES * (1 - WEIGHT_DEVICE_RESERVE)


def test_ratios_near_the_papers() -> None:
    figure = f.figure6()
    for model, low in (("Q", 4), ("Q", 16)):
        for system in ("kvcached", "static"):
            ours, paper = figure.ratio(model, low, system), f.paper_ratio(model, low, system)
            assert ours is not None and paper is not None
            assert 0.7 < ours / paper < 1.3
    ours = figure.ratio("G", 4, "kvcached")
    assert ours is not None and 10 < ours < 25
    assert figure.ratio("G", 64, "kvcached") is None


def test_ratios_do_not_depend_on_time(monkeypatch: pytest.MonkeyPatch) -> None:
    before = f.figure6()
    monkeypatch.setattr(f, "TBT_S", {"Q": 1.0, "G": 2.0, "D": 3.0})
    after = f.figure6()
    assert after.cell("Q", 4, "static").rate != before.cell("Q", 4, "static").rate
    assert after.ratio("Q", 4, "static") == before.ratio("Q", 4, "static")
    rates = [after.cell("Q", 4, system).rate for system in ("crosspool", "static")]
    assert rates[0] / rates[1] == pytest.approx(before.ratio("Q", 4, "static"))


def test_reserves_that_leave_nothing() -> None:
    with pytest.raises(ConfigError, match=r"reserve 0\.9"):
        f.figure6(0.9)
    with pytest.raises(ConfigError, match="devices"):
        EqualDevices(count=0, bytes=1)
    with pytest.raises(ConfigError, match="weight reserve"):
        EqualDevices(count=1, bytes=1, weight_reserve=1.5)
