"""What a tokenizer manager has received of its requests' outputs, and what it may skip.

After a detokenizer has died, the next one sends each request's output again from its beginning
(:mod:`crosspool.frontend.sent`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crosspool.frontend import private

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

_LOGPROBS = tuple(
    f"{side}_{name}_{part}"
    for side in ("input", "output")
    for name in ("token_logprobs", "top_logprobs", "token_ids_logprobs")
    for part in ("val", "idx")
)
"""Lists that an output may have for each of its requests."""


class Received:
    """Cuts from outputs what ``manager`` has, and what is not its own. ``mark`` is on the outputs
    of its own requests; others were asked for by a process that has died, or of one."""

    def __init__(self, manager: TokenizerManager, mark: str) -> None:
        self._manager = manager
        self._mark = mark
        self._text_ahead: dict[str, int] = {}
        """Characters by which the manager is ahead of the present detokenizer, by request id."""
        self._ended: dict[str, None] = {}
        """Requests whose ends have come and are not confirmed, in order."""

    def cut(self, output: Any) -> bool:
        """Returns whether anything is left of ``output``."""
        marks = output.http_worker_ipcs or [self._mark] * len(output.rids)
        own = [mark == self._mark for mark in marks]
        for rid, reason, is_own in zip(output.rids, output.finished_reasons, own, strict=True):
            if reason is not None and is_own:
                self._ended[rid] = None
        kept = [is_own and self._is_new(output, index) for index, is_own in enumerate(own)]
        if not all(kept):
            private.keep_only(output, kept)
        return any(kept)

    def _is_new(self, output: Any, index: int) -> bool:
        """Cuts what is known from one request's part of the output; returns whether any news is
        left."""
        rid, ends = output.rids[index], output.finished_reasons[index] is not None
        state = self._manager.rid_to_state.get(rid)
        if state is None:
            self._text_ahead.pop(rid, None)
            return not ends
        token_ids = output.output_ids[index]
        start = output.completion_tokens[index] - len(token_ids)
        known = len(state.output_ids) - start
        if known > 0:
            self._cut_known(output, index, state, known)
            if start == 0:
                self._text_ahead[rid] = len(state.get_text())
            else:  # the last word of a dead detokenizer, which the next one has repeated
                output.output_strs[index] = ""
        if rid in self._text_ahead:
            self._cut_text(output, index, rid)
        if ends:
            self._text_ahead.pop(rid, None)
        return ends or known < len(token_ids) or bool(output.output_strs[index])

    def _cut_known(self, output: Any, index: int, state: Any, known: int) -> None:
        output.output_ids[index] = output.output_ids[index][known:]
        left = len(output.output_ids[index])
        for name in _LOGPROBS:
            column = getattr(output, name)
            if column is not None and column[index]:
                # Those of a prompt come with the first token, those of the output with each.
                end = len(column[index])
                column[index] = column[index][end - left if "output" in name else end :]

    def _cut_text(self, output: Any, index: int, rid: str) -> None:
        text = output.output_strs[index]
        ahead = self._text_ahead[rid]
        output.output_strs[index] = text[ahead:]
        self._text_ahead[rid] = max(ahead - len(text), 0)
        if not self._text_ahead[rid]:
            del self._text_ahead[rid]

    @property
    def has_ended(self) -> bool:
        """Whether the end of any request is not confirmed."""
        return bool(self._ended)

    def note_end(self, rid: str) -> None:
        """A request has ended without an output."""
        self._ended[rid] = None

    def take_ended(self) -> list[str]:
        """The requests whose ends have come since the last call, to be confirmed."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def reopen(self, rid: str) -> None:
        """Another request is given this id, which confirms the end of the one that had it."""
        self._ended.pop(rid, None)
