"""Text that every Python carries, for prompts."""

from __future__ import annotations

import re
from pydoc_data import topics


def sentences(count: int) -> list[str]:
    """``count`` different openings of paragraphs, 30 to 300 characters long."""
    paragraphs: list[str] = []
    for name in sorted(topics.topics):
        for paragraph in topics.topics[name].split("\n\n"):
            text = re.sub(r"\s+", " ", paragraph).strip()
            if len(text) > 80 and text[0].isupper():
                paragraphs.append(text)
    step = len(paragraphs) // count
    return [paragraphs[i * step][: 30 + 270 * i // count] for i in range(count)]
