"""The native rule of which experts stay decides as one that tries every run of neighbours."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from support.expert_memory import ExpertMemory

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("experts") / "expert_memory_check"
    sources = [NATIVE / "test/expert_memory_check.cpp", NATIVE / "cpu/engine/expert_memory.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True, timeout=120)
    return program


class Both:
    """Does the same to the reference, and writes down what the program is to do and to print."""

    def __init__(self, nbytes: int) -> None:
        self.reference = ExpertMemory(nbytes)
        self.asked: list[str] = []
        self.expected: list[str] = []

    def do(self, what: str, *value: int) -> None:
        self.asked.append(" ".join(map(str, (what, *value))))
        result = getattr(self.reference, what)(*value)
        if what == "add":
            self.expected.append(str(result))
        elif what == "place":
            offset = self.reference.of(*value).offset
            said = "none" if result is None else " ".join(map(str, (offset, *result)))
            self.expected.append(said)

    def check(self, program: Path) -> None:
        done = subprocess.run(
            [program, str(self.reference.bytes)],
            input="\n".join(self.asked),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.splitlines() == self.expected


@pytest.mark.parametrize("seed", range(20))
def test_decisions_are_those_of_the_reference(program: Path, seed: int) -> None:
    """Experts of one size or of several come, are used, held, given up and removed."""
    draw = random.Random(seed)
    sizes = [64 * draw.randint(2, 9) for _ in range(1 if seed % 3 == 0 else 4)]
    both = Both(64 * draw.randint(12, 30))
    both.do("half_life", draw.choice([1, 8, 100]))
    held: list[int] = []
    experts: list[int] = []
    for _ in range(800):
        present = both.reference.present()
        absent = [one for one in experts if one not in present]
        loose = [one for one in experts if one not in held]
        match draw.choices(
            ("add", "remove", "tick", "use", "hold", "release", "drop", "place"),
            (3, 1, 4, 8, 2, 3, 1, 12),
        )[0]:
            case "add":
                both.do("add", draw.choice(sizes))
                experts.append(int(both.expected[-1]))
            case "remove" if len(loose) > 4:
                gone = draw.choice(loose)
                experts.remove(gone)
                both.do("remove", gone)
            case "tick":
                both.do("tick")
            case "use" if experts:
                both.do("use", draw.choice(experts))
            case "hold" if experts:
                held.append(draw.choice(experts))
                both.do("hold", held[-1])
            case "release" if held:
                both.do("release", held.pop(draw.randrange(len(held))))
            case "drop" if present:
                both.do("drop", draw.choice(present))
            case "place" if absent:
                both.do("place", draw.choice(absent))
    assert any(" " in line for line in both.expected), "none ever went"
    both.check(program)


def test_the_least_used_goes_and_what_was_used_long_ago_counts_less(program: Path) -> None:
    both = Both(3 * 64)
    both.do("half_life", 10)
    for number in range(4):
        both.do("add", 64)
        if number < 3:
            both.do("place", number)
    for _ in range(5):
        both.do("use", 0)
    for _ in range(40):  # five uses count less than one then
        both.do("tick")
    both.do("use", 1)
    both.do("use", 2)
    both.do("place", 3)
    assert both.expected[-1] == "0 0"
    both.do("use", 3)
    both.do("use", 3)
    both.do("hold", 1)
    both.do("place", 0)
    assert both.expected[-1] == "128 2"
    both.do("hold", 3)
    both.do("hold", 0)
    both.do("place", 2)
    assert both.expected[-1] == "none"
    both.check(program)


def test_a_large_expert_takes_the_neighbours_that_are_worth_least(program: Path) -> None:
    both = Both(4 * 64)
    for _ in range(4):
        both.do("add", 64)
        both.do("place", int(both.expected[-1]))
    for expert, uses in enumerate((1, 3, 1, 1)):
        for _ in range(uses):
            both.do("use", expert)
    both.do("add", 128)
    both.do("place", 4)
    assert both.expected[-1] == "128 2 3"
    both.check(program)


def test_uses_stay_comparable_for_ever(program: Path) -> None:
    """The weight of a use grows beyond what a number can hold, and is scaled down in time."""
    both = Both(2 * 64)
    both.do("half_life", 1)
    for number in range(3):
        both.do("add", 64)
        both.do("use", number)
    both.do("place", 0)
    both.do("place", 1)
    for round_ in range(3000):
        both.do("tick")
        if round_ % 700 == 0:
            both.do("use", round_ // 700 % 2)
    both.do("place", 2)
    assert both.expected[-1] == "64 1"
    both.check(program)
