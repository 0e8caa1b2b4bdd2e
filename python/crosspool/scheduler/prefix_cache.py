"""The prefix cache of one attention rank: full pages of computed tokens, kept to be used again.

Each model and namespace has a radix tree. An entry is one page, its edge the page's tokens, and the
path to it the whole beginning of the sequence, on which K and V depend. A request *uses* a path
from its beginning. Entries that no request uses are *idle* and stand in one order over all models,
least recently used first, in which every entry comes before its parent. So the first entry is
always a leaf, and giving it up, using it and putting it back are O(1) each.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Namespace = tuple[str, str]
"""SGLang's (cache_salt, extra_key): requests share entries only within one namespace."""


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
        """Number of requests that use the entry; a parent has at least as many as each child."""


class Root:
    """The root of the tree of one model and namespace."""

    __slots__ = ("children", "name")

    def __init__(self, name: tuple[int, Namespace]) -> None:
        self.name = name
        self.children: dict[bytes, Entry] = {}


class PageKeys:
    """The keys of a sequence's full pages, to be extended as the sequence grows."""

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
        """Number of tokens."""
        return len(self._tokens)

    def __getitem__(self, pages: slice) -> list[bytes]:
        return self._keys[pages]


class PrefixCache:
    """The trees of one attention rank. The cache knows pages by number only; the caller tells the
    allocator what becomes of them."""

    def __init__(self) -> None:
        self._roots: dict[tuple[int, Namespace], Root] = {}
        self._idle: OrderedDict[Entry, None] = OrderedDict()

    def match(self, model: int, namespace: Namespace, keys: Iterable[bytes]) -> list[Entry]:
        """Returns the longest path that matches ``keys``. Changes nothing, not even the order."""
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
        """A request uses ``path`` from now on; until :meth:`leave`, none of it is given up."""
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
        """Appends the request's further ``pages``, with their ``keys``, as entries in use to the
        ``path`` that it uses. Stops where another request's page has the same tokens already."""
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
        """The request that uses ``path`` ends. Its further ``pages``, with their ``keys``, become
        entries, unless another request's pages have the same tokens. Everything that it leaves
        counts as recently used.

        Returns the pages that are idle entries from now on, and those that became no entries."""
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
        """Drops the ``count`` least recently used idle entries, or all when there are fewer.
        Returns their (model, page) pairs."""
        dropped: list[tuple[int, int]] = []
        while self._idle and len(dropped) < count:
            entry, _ = self._idle.popitem(last=False)
            self._drop(entry)
            dropped.append((entry.model, entry.page))
        return dropped

    def flush(self, model: int | None) -> list[tuple[int, int]]:
        """Drops every idle entry (of ``model``, if given); returns their (model, page) pairs."""
        dropped = [entry for entry in self._idle if model in (None, entry.model)]
        for entry in dropped:
            del self._idle[entry]
            self._drop(entry)
        return [(entry.model, entry.page) for entry in dropped]

    def _place(self, model: int, namespace: Namespace, path: list[Entry]) -> Entry | Root:
        """The end of ``path``, or where that is empty the root, which is made if need be."""
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
