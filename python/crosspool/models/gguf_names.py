"""What GGUF files call the tensors of Hugging Face checkpoints, which ``gguf`` knows."""

from __future__ import annotations

import re
from typing import Any

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)")


class GGUFNames:
    """The names of one architecture."""

    def __init__(self, architecture: str, layers: int) -> None:
        """``layers``: number of layers that the file has."""
        from gguf.constants import MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        self._names: Any = get_tensor_name_map(numbers[architecture], layers)

    def of(self, name: str) -> tuple[str | None, int | None]:
        """Returns the name of a tensor in the file, None where it has none, and the expert whose
        part of that tensor it is."""
        expert = None
        if match := _EXPERT.match(name):
            name, expert = f"{match[1]}.{match[3]}.{match[4]}", int(match[2])
        if name.endswith(".sinks"):
            name += ".weight"
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        return self._names.get_name(name, (".weight", ".bias")), expert
