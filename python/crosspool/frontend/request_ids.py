"""Which ids belong to which request.

A client may name its request by ``rid``. SGLang gives a request with several prompts or samples one
id each, ``a_0``, ``a_1`` and so on for a request ``a``, and every sample of such a prompt a random
id in the end. So the ids of a request are a tree, and an abort of ``a`` means all of it and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterable


class RequestIds:
    """The ids of requests that are being worked on."""

    def __init__(self) -> None:
        self._below: dict[str, list[str]] = {}
        """What SGLang made of each id."""
        self._aborted: set[str] = set()

    def __contains__(self, rid: str) -> bool:
        return rid in self._below

    def add(self, rids: Iterable[str], of: str | None = None) -> None:
        """Notes ids of a request, none of which is noted yet. ``of`` is the noted id that they
        stand for, if there is one."""
        for rid in rids:
            self._below[rid] = []
            if of is not None:
                self._below[of].append(rid)

    def number_below(self, rid: str) -> int:
        """How many ids SGLang has made of the noted id ``rid`` itself so far."""
        return len(self._below[rid])

    def all_of(self, rid: str) -> list[str]:
        """``rid`` itself and all ids that stand for it."""
        return [rid, *(one for below in self._below.get(rid, ()) for one in self.all_of(below))]

    def abort(self, rid: str) -> list[str]:
        """The ids that an abort of ``rid`` ends. Ids that would stand for it later are not to be
        added (see :meth:`is_aborted`)."""
        ids = self.all_of(rid)
        self._aborted.update(one for one in ids if one in self)
        return ids

    def is_aborted(self, rid: str) -> bool:
        return rid in self._aborted

    def forget(self, rid: str) -> list[str]:
        """Forgets ``rid`` and all ids that stand for it, and returns them."""
        ids = self.all_of(rid)
        for one in ids:
            self._below.pop(one, None)
            self._aborted.discard(one)
        return ids
