"""What the scheduler has sent to the detokenizer and the HTTP process may not have.

**Nothing is lost and nothing is repeated when a detokenizer dies**: until the HTTP process has
confirmed that a request has ended, the scheduler process keeps all that it has sent of it. The next
detokenizer gets all of that again, as one output for each request, and the HTTP process skips the
tokens and the text that it has (:mod:`crosspool.frontend.received`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from crosspool.frontend.messages import Item, OpenRequest
from crosspool.scheduler.request import Output
from crosspool.transport.messages import TokenLogprobs


@dataclasses.dataclass
class _Record:
    request: OpenRequest
    last: Output
    token_ids: list[int] = dataclasses.field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)

    def add(self, output: Output) -> None:
        self.last = output
        self.token_ids += output.token_ids
        self.output_logprobs += output.output_logprobs
        self.prompt_logprobs += output.prompt_logprobs

    @property
    def whole(self) -> Output:
        return dataclasses.replace(
            self.last,
            first=True,
            token_ids=self.token_ids,
            output_logprobs=self.output_logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


class Sent:
    """The outputs of one front end's requests."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, request: OpenRequest, output: Output) -> None:
        record = self._records.get(output.rid)
        # A front end uses an id again only when it has seen the end of the request that had it.
        if record is None or output.first:
            record = self._records[output.rid] = _Record(request, output)
        record.add(output)

    def confirm(self, rids: Iterable[str]) -> None:
        """The front end has seen the end of these requests."""
        for rid in rids:
            record = self._records.get(rid)
            if record is not None and record.last.finish is not None:
                del self._records[rid]

    def forget_ended(self) -> None:
        """Nobody waits for the ends that have been sent."""
        self.confirm(list(self._records))

    def items(self) -> list[Item]:
        """All that has been sent and is kept, one output for each request."""
        return [(record.request, record.whole) for record in self._records.values()]
