"""The checks of the report, ordered by what they tell per second within each part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PARTS = {
    "a": "Does it work?",
    "b": "How fast is it?",
    "c": "Does it keep working?",
}
PART_SECONDS = 520.0
"""Seconds that a part may take, so that it stays under nine minutes with its last page."""
RUNGS = ("eager steps", "captured steps", "whole step", "resident steps")
"""Checks whose names are the rungs of the ladder, the lowest first."""


@dataclass(frozen=True)
class Check:
    """One check: a function that a process of its own calls."""

    name: str
    part: str
    answers: str
    """The question that it answers."""
    seconds: float
    """Most seconds that it may take."""
    module: str
    """Module of this package with the function."""
    function: str
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    needs_gpu: bool = False
    """Whether it asks something that only a GPU can answer."""
    needs_platform: bool = True
    """Whether it uses PyTorch and the GPU. One that does not also tells where these fail."""

    @property
    def file(self) -> str:
        """Stem of the names of its files."""
        return self.name.replace(" ", "_")


CHECKS = (
    Check(
        "machine", "a", "Which driver, programs and packages are there?", 60,
        "machine_check", "machine", needs_platform=False,
    ),
    Check(
        "device", "a", "Which GPU is it, as CUDA sees it?", 60,
        "machine_check", "device", needs_gpu=True,
    ),
    Check(
        "kernels", "a", "Do the kernels of the bundled models compile?", 240,
        "kernels_check", "compile_kernels", {"what": "bundled"}, needs_gpu=True,
    ),
    Check(
        "unmapped KV", "a", "Can stages be captured while no KV is mapped?", 60,
        "memory_checks", "unmapped_kv",
    ),
    Check(
        "device launch", "a", "Can the device launch the graph of every stage?", 90,
        "graph_checks", "device_launch",
    ),
    Check(
        "limits", "a", "How many launches can one execution on the device make, at what cost?", 40,
        "program_checks", "resident_gpu", {"experiment": "limits"}, needs_gpu=True,
    ),
    Check(
        "lanes", "a", "What does a hand-over between stages cost, by lanes?", 60,
        "program_checks", "resident_gpu", {"experiment": "lanes"}, needs_gpu=True,
    ),
    Check(
        "blocking", "a", "Which calls of CUDA wait behind a resident loop?", 90,
        "program_checks", "resident_gpu", {"experiment": "blocking"}, needs_gpu=True,
    ),
    Check(
        "stage parity", "a", "Which stage is the first to compute something wrong?", 90,
        "parity_check", "stage_parity",
    ),
    Check(
        "beside the loop", "a", "Do allocations and loads return while a loop is resident?", 60,
        "loop_checks", "beside_the_loop", needs_gpu=True,
    ),
    Check(
        "guard", "a", "Is what may wait for ever refused while a loop is resident?", 40,
        "loop_checks", "guard",
    ),
    Check(
        "streams", "a", "Does a stream share its connection with the loop?", 40,
        "loop_checks", "streams", needs_gpu=True,
    ),
    Check(
        "mapping", "a", "Can memory be mapped and unmapped beside the loop?", 60,
        "memory_checks", "mapping_beside_the_loop",
    ),
    Check(
        "kernels of the shape", "b", "Do the kernels compile of the model whose times are taken?",
        120, "kernels_check", "compile_kernels", {"what": "shape"}, needs_gpu=True,
    ),
    Check(
        "eager steps", "b", "Do plain calls of the stages choose the reference's tokens?", 60,
        "ladder_checks", "eager_steps",
    ),
    Check(
        "captured steps", "b", "Do captured stages choose them when the host launches each?", 60,
        "ladder_checks", "captured_steps",
    ),
    Check(
        "whole step", "b", "Does a whole step choose them as one graph?", 60,
        "ladder_checks", "whole_step",
    ),
    Check(
        "resident steps", "b", "Do captured stages choose them when the device launches each?", 60,
        "ladder_checks", "resident_steps",
    ),
    Check(
        "step times", "b", "How long do a step and each of its stages take?", 200,
        "time_checks", "step_times",
    ),
    Check(
        "resident step times", "b", "How long does a step of the resident loop take?", 120,
        "time_checks", "resident_step_times",
    ),
    Check(
        "mapping costs", "b", "What does mapping memory cost?", 90,
        "memory_checks", "mapping_costs",
    ),
    Check(
        "kernels again", "c", "Are the kernels of the bundled models still there?", 240,
        "kernels_check", "compile_kernels", {"what": "bundled"}, needs_gpu=True,
    ),
    Check(
        "many steps", "c", "Are many steps right whose inputs change every time?", 120,
        "loop_checks", "many_steps",
    ),
    Check(
        "NVSHMEM", "c", "Does NVSHMEM carry rows to itself within a loop?", 60,
        "program_checks", "nvshmem", needs_gpu=True,
    ),
    Check(
        "tests", "c", "Do the tests marked gpu pass?", 300,
        "program_checks", "gpu_tests",
    ),
    Check(
        "sanitizer", "c", "Does compute-sanitizer find anything?", 180,
        "program_checks", "sanitizer", needs_gpu=True,
    ),
)  # fmt: skip


def named(name: str) -> Check:
    """Returns the check of this name. Raises KeyError, which lists the names."""
    for check in CHECKS:
        if check.name == name:
            return check
    raise KeyError(f"no check {name!r}; there are: {', '.join(c.name for c in CHECKS)}")
