"""What the scheduler was told of one model, and what another one in its place has to be told."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import io_struct

from crosspool.frontend import private
from crosspool.frontend.control_requests import ANSWERED, FORWARDED
from crosspool.frontend.own_messages import Disown, Resume

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

log = logging.getLogger(__name__)


class Told:
    """Notes what ``manager`` tells the scheduler that no answer has made obsolete."""

    def __init__(self, manager: TokenizerManager) -> None:
        self._manager = manager
        self._unanswered: deque[Any] = deque()
        """What the scheduler was asked beside requests, and has not answered, in order."""
        self.pause: io_struct.PauseGenerationReqInput | None = None
        """What has paused the model, while it is paused."""

    def note_requests(self, messages: Iterable[io_struct.TokenizedGenerateReqInput]) -> None:
        """Notes requests, until they end."""
        private.note_sent(self._manager, messages)

    def note(self, message: Any) -> None:
        """Notes what is no request, until it is answered."""
        if isinstance(message, ANSWERED):
            self._unanswered.append(message)

    def note_answer(self, message: Any) -> None:
        """Takes what has come from the scheduler."""
        answers = isinstance(message, io_struct.BaseReq) and not isinstance(message, FORWARDED)
        if self._unanswered and answers and not isinstance(message, io_struct.AbortReq):
            self._unanswered.popleft()  # answers come in the order of the questions

    def note_abort_of_all(self) -> None:
        """Notes that every request is to be aborted, which SGLang does not."""
        for _, state in private.sent_requests(self._manager):
            state.abort_sent = True

    def tell_again(self, mark: str) -> None:
        """Has a new scheduler go on with every request of the one before it, behind the tokens that
        have come, and tells it whatever else that one knew or has not answered. Outputs of the
        requests are to have the ``mark``."""
        self._tell(Disown())
        if self.pause is not None:
            self._tell(self.pause)
        unanswered, self._unanswered = self._unanswered, deque()
        for message in unanswered:
            self._tell(message)
        taken = private.sent_requests(self._manager)
        for message, state in taken:
            message.http_worker_ipc = mark
            self._tell(Resume(message=message, output_ids=state.output_ids))
            if state.abort_sent:
                self._tell(io_struct.AbortReq(rid=message.rid))
        log.warning("the scheduler is a new one: it goes on with %d requests", len(taken))

    def _tell(self, message: Any) -> None:
        private.tell_scheduler(self._manager, message)
