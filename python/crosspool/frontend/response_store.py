"""The responses that ``--enable-response-store`` keeps, bounded in number and in bytes.

SGLang's handlers of ``/v1/responses``, one per model, keep them in two dicts each, for ever: the
responses, and the conversations that lead to them. A :class:`ResponseStore` is these dicts for all
models, so a conversation may go on with another model. It forgets a response together with its
conversation, least recently used first.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from pydantic import BaseModel


class ResponseStore:
    """At most ``most`` responses, which take at most ``most_bytes`` bytes of memory with their
    conversations."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._used: OrderedDict[str, None] = OrderedDict()
        """Ids, least recently used first."""
        self.responses = _Part(self)
        """Responses by id."""
        self.conversations = _Part(self)
        """All messages of the conversation that ends with a response, by the response's id."""

    def touch(self, response_id: str) -> None:
        """Notes that a response was used."""
        self._used[response_id] = None
        self._used.move_to_end(response_id)

    def resize(self, by: int) -> None:
        """Notes that ``by`` bytes came, and forgets responses until the rest is within bounds. A
        response that is too large alone is forgotten, too."""
        self._bytes += by
        while self._used and (len(self._used) > self._most or self._bytes > self._most_bytes):
            self.forget(next(iter(self._used)))

    def forget(self, response_id: str) -> None:
        """Takes a response out, with its conversation."""
        del self._used[response_id]
        self._bytes -= self.responses.drop(response_id) + self.conversations.drop(response_id)


class _Part(MutableMapping[str, Any]):
    """One of the two dicts."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._entries: dict[str, tuple[Any, int]] = {}
        """Pairs (value, bytes of it) by id."""

    def __getitem__(self, response_id: str) -> Any:
        value, _ = self._entries[response_id]
        self._store.touch(response_id)
        return value

    def __setitem__(self, response_id: str, value: Any) -> None:
        before, size = self.drop(response_id), memory_of(value)
        self._entries[response_id] = (value, size)
        self._store.touch(response_id)
        self._store.resize(size - before)

    def __delitem__(self, response_id: str) -> None:
        if response_id not in self._entries:
            raise KeyError(response_id)
        self._store.forget(response_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def drop(self, response_id: str) -> int:
        """Takes an entry out, if there is one, and returns its number of bytes."""
        return self._entries.pop(response_id, (None, 0))[1]


def memory_of(value: Any) -> int:
    """Bytes of memory that ``value`` takes, with all that is in it. What is in it twice counts
    twice."""
    total, left = 0, [value]
    while left:
        one = left.pop()
        total += sys.getsizeof(one)
        if isinstance(one, BaseModel):
            left.append(one.__dict__)
        elif isinstance(one, Mapping):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list | tuple | set):
            left += one
    return total
