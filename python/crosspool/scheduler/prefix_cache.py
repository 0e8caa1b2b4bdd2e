"""Full pages of tokens that were computed on one attention rank, to be used again.

Per model and namespace a radix tree: an entry is one page, its edge the page's tokens, and the path
to it the whole beginning of the sequence, on which K and V depend. Requests *use* a path from its
beginning; entries that nobody uses are *idle* and stand in one order over all models, least
recently used first, in which every entry comes before its parent. So the first one is always a
leaf, and giving it up, using it and putting it back are O(1) each.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Namespace = tuple[str, str]
"""Requests share entries only within one: SGLang's (cache_salt, extra_key)."""


class Entry:
    """One page of the tree."""

    __slots__ = ("children", "key", "model", "page", "parent", "users")

    def __init__(self, model: int, key: bytes, page: int, parent: Entry | Root) -> None:
        self.model = model
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[bytes, Entry] = {}
        self.users = 0
        """Requests that use it. A parent has at least as many as each child."""


class Root:
    """Where the tree of one model and namespace begins."""

    __slots__ = ("children", "name")

    def __init__(self, name: tuple[int, Namespace]) -> None:
        self.name = name
        self.children: dict[bytes, Entry] = {}


class PageKeys:
    """A sequence's full pages as keys; ``extend`` it as the sequence grows."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._tokens = array("i")
        self._keys: list[bytes] = []

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        size = self.page_size
        for start in range(len(self._keys) * size, len(self._tokens) - size + 1, size):
            self._keys.append(self._tokens[start : start + size].tobytes())

    def __len__(self) -> int:
        """Tokens."""
        return len(self._tokens)

    def __getitem__(self, pages: slice) -> list[bytes]:
        return self._keys[pages]


class PrefixCache:
    """The trees of one attention rank. It knows pages by number only: the caller tells the
    allocator what becomes of them."""

    def __init__(self) -> None:
        self._roots: dict[tuple[int, Namespace], Root] = {}
        self._idle: OrderedDict[Entry, None] = OrderedDict()

    def match(self, model: int, namespace: Namespace, keys: Iterable[bytes]) -> list[Entry]:
        """The longest path that ``keys`` have here. Changes nothing, not even the order."""
        path: list[Entry] = []
        place: Entry | Root | None = self._roots.get((model, namespace))
        if place is not None:
            for key in keys:
                place = place.children.get(key)
                if place is None:
                    break
                path.append(place)
        return path

    def use(self, path: list[Entry]) -> None:
        """A request uses ``path``; until :meth:`leave`, none of it is given up."""
        for entry in path:
            if entry.users == 0:
                del self._idle[entry]
            entry.users += 1

    def grow(
        self,
        model: int,
        namespace: Namespace,
        path: list[Entry],
        keys: Sequence[bytes],
        pages: Sequence[int],
    ) -> None:
        """Appends to the ``path`` that a request uses its further pages, with their ``keys``, as
        entries in use; ends where somebody else's page has the same tokens already."""
        place = self._place(model, namespace, path)
        for key, page in zip(keys, pages, strict=True):
            if key in place.children:
                break
            place = self._add(model, place, key, page)
            place.users = 1
            path.append(place)
        self._forget_empty(self._roots[model, namespace])

    def leave(
        self,
        model: int,
        namespace: Namespace,
        path: list[Entry],
        keys: Sequence[bytes],
        pages: Sequence[int],
    ) -> tuple[list[int], list[int]]:
        """The request that uses ``path`` ends; its further ``pages`` with their ``keys`` become
        entries, unless somebody else's have the same tokens. All that it leaves is recently used.

        Returns the pages that are idle entries from now on, and those that became none."""
        became_idle: list[int] = []
        spare: list[int] = []
        place = self._place(model, namespace, path)
        whole = list(path)
        for key, page in zip(keys, pages, strict=True):
            entry = place.children.get(key)
            if entry is None:
                entry = self._add(model, place, key, page)
                became_idle.append(page)
            else:
                spare.append(page)
            whole.append(entry)
            place = entry
        for entry in path:
            entry.users -= 1
            if entry.users == 0:
                became_idle.append(entry.page)
        for entry in reversed(whole):
            if entry.users == 0:
                self._idle[entry] = None
                self._idle.move_to_end(entry)
        self._forget_empty(self._roots[model, namespace])
        return became_idle, spare

    def give_up(self, count: int) -> list[tuple[int, int]]:
        """Drops the ``count`` least recently used idle entries, or all when there are fewer;
        returns their (model, page)."""
        dropped: list[tuple[int, int]] = []
        while self._idle and len(dropped) < count:
            entry, _ = self._idle.popitem(last=False)
            self._drop(entry)
            dropped.append((entry.model, entry.page))
        return dropped

    def flush(self, model: int | None) -> list[tuple[int, int]]:
        """Drops every idle entry (of ``model``, if given); returns their (model, page)."""
        dropped = [entry for entry in self._idle if model in (None, entry.model)]
        for entry in dropped:
            del self._idle[entry]
            self._drop(entry)
        return [(entry.model, entry.page) for entry in dropped]

    def _place(self, model: int, namespace: Namespace, path: list[Entry]) -> Entry | Root:
        """The end of ``path``; the root, made if there is none, where it is empty."""
        name = (model, namespace)
        root = self._roots.setdefault(name, Root(name))
        return path[-1] if path else root

    @staticmethod
    def _add(model: int, parent: Entry | Root, key: bytes, page: int) -> Entry:
        entry = parent.children[key] = Entry(model, key, page, parent)
        return entry

    def _drop(self, entry: Entry) -> None:
        assert not entry.users and not entry.children
        del entry.parent.children[entry.key]
        if isinstance(entry.parent, Root):
            self._forget_empty(entry.parent)

    def _forget_empty(self, root: Root) -> None:
        if not root.children:
            del self._roots[root.name]
