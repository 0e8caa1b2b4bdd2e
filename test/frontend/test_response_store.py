"""The store of responses: bounded in number and bytes, whatever SGLang's handler does to it."""

from __future__ import annotations

import random

import pytest
from crosspool.frontend.response_store import ResponseStore, memory_of
from pydantic import BaseModel


class Answer(BaseModel):
    text: str


def keep(store: ResponseStore, name: str, text: str = "x") -> None:
    """Keeps a response as the handler does: conversation, response, and conversation again."""
    store.conversations[name] = [{"role": "user", "content": text}]
    store.responses[name] = Answer(text=text)
    store.conversations[name] = [{"role": "user", "content": text}, {"content": text}]


def test_the_least_recently_used_goes_first_and_with_its_conversation() -> None:
    store = ResponseStore(2, 1 << 20)
    keep(store, "a")
    keep(store, "b")
    assert store.responses.get("a") is not None
    keep(store, "c")
    assert set(store.responses) == set(store.conversations) == {"a", "c"}
    assert store.responses.get("b") is None
    with pytest.raises(KeyError):
        store.conversations["b"]


def test_bytes_are_bounded() -> None:
    store = ResponseStore(1000, 100_000)
    for index in range(50):
        keep(store, str(index), "x" * 9_000)
    assert 2 <= len(store.responses) <= 4
    assert "49" in store.responses
    keep(store, "huge", "x" * 200_000)
    assert "huge" not in store.responses and "huge" not in store.conversations


def test_memory_counts_what_is_within() -> None:
    assert memory_of(Answer(text="x" * 1000)) > 1000
    assert memory_of([{"content": [{"text": "x" * 1000}]}]) > 1000
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert memory_of(deep) > 100_000


def test_any_order_of_use_keeps_the_books() -> None:
    generator = random.Random(3)
    store = ResponseStore(5, 20_000)
    for _ in range(3000):
        name = str(generator.randrange(12))
        part = generator.choice([store.responses, store.conversations])
        match generator.randrange(3):
            case 0:
                part[name] = "x" * generator.randrange(5000)
            case 1:
                part.get(name)
            case _:
                part.pop(name, None)
        held = {**store.responses}, {**store.conversations}
        total = sum(memory_of(value) for values in held for value in values.values())
        assert store._bytes == total <= 20_000
        assert len(held[0].keys() | held[1].keys()) == len(store._used) <= 5
