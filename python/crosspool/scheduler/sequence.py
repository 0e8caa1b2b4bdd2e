"""One request inside the scheduler: its tokens, how many are computed, and what was delivered."""

from __future__ import annotations

import math

import msgspec

from crosspool.scheduler.prefix_cache import Entry, PageKeys
from crosspool.scheduler.request import Finish, GenerateRequest, Output
from crosspool.scheduler.request_timeline import PhaseName, RequestTimeline
from crosspool.scheduler.stopping import Stopping
from crosspool.transport.messages import Logprobs, Open, Row, TokenLogprobs


class Sequence:
    """A request waits while it has no ``pages``, and runs on attention rank ``rank`` once it has.
    When it is ``over``, a last step of it may still be ``in_flight``. If its rank is lost, it waits
    again, and is *replayed*: all its tokens are computed again wherever it is admitted next. So is
    a request that an earlier scheduler had taken."""

    def __init__(
        self,
        number: int,
        request: GenerateRequest,
        *,
        limit: int,
        arrived: float,
        deadline: float,
        stopping: Stopping,
        page_size: int,
    ) -> None:
        self.number = number
        self.request = request
        self.limit = limit
        """Most tokens that the request may reach, prompt included."""
        self.arrived = arrived
        """Clock time at which the request came."""
        self.deadline = deadline
        """Clock time at which the request is refused if it still waits."""
        self.stopping = stopping

        self.prompt_len = len(request.input_ids)
        self.tokens = list(request.input_ids)
        self.prefill_len = self.prompt_len
        """Number of tokens that are computed in chunks, before the others one at a time: the
        prompt, and in a replay what had been sampled before it."""
        self.replayed = False
        """Whether the request was admitted before, to a rank that was lost, or may have been."""
        self.reached = 0
        """Tokens that had been computed on the rank that was lost."""
        self.cached = 0
        """Prompt tokens whose KV was cached when the request was first admitted."""
        self.computed = 0
        """Tokens whose KV exists or is written by the step in flight; cached ones are included."""
        self.rank = -1
        self.pages: list[int] = []
        """Pages promised to the request, in the order in which its tokens fill them."""
        self.path: list[Entry] = []
        """Entries of the prefix cache that are the first of ``pages``."""
        self.pages_sent = 0
        self.opened = False
        """Whether the attention rank has been told of the request."""
        self.in_flight = False
        self.undecided = False
        """Whether its last token was sampled and its grammar has not followed that token yet. Until
        it has, the request is in no step."""
        self.over = False
        self.is_timed = not request.is_probe and request.delivered is None
        """Whether what the request takes is counted."""
        self.sampled_at: float | None = None
        """Clock time at which its last token was sampled; None before the first."""
        self.timeline: RequestTimeline | None = None
        """None where the request is not traced."""
        if request.traceparent is not None:
            first: PhaseName = "queue" if request.delivered is None else "replay"
            self.timeline = RequestTimeline(request.traceparent, first, arrived)

        self._keys = PageKeys(page_size)
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._output_logprobs: list[TokenLogprobs] = []
        self._delivered = self.prompt_len
        self._first = True

    @property
    def most_tokens(self) -> int:
        """Number of tokens, prompt included, for which it may need pages."""
        return max(self.limit, self.prompt_len + (self.request.stop.max_new_tokens != 0))

    @property
    def model(self) -> int:
        return self.request.model

    @property
    def prefill_only(self) -> bool:
        return self.limit == self.prompt_len

    @property
    def wants_next(self) -> bool:
        """Whether a request that generates nothing asks what could come next: the log-probabilities
        at its last position, as scoring does."""
        wanted = self.request.logprobs
        return self.prefill_only and wanted.output and bool(wanted.top or wanted.token_ids)

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prefill_len

    @property
    def has_output(self) -> bool:
        """Whether a token has been sampled since the request was admitted where it runs."""
        return len(self.tokens) > self.prefill_len

    @property
    def leasable(self) -> bool:
        """Whether a rank can go on by itself from token to token, until a stop token or ``limit``,
        since nothing else that only the scheduler knows could end the request."""
        return not self.prefill_only and self.stopping.by_tokens

    # --- pages

    @property
    def reusable(self) -> int:
        """Prompt tokens that need not be computed if their KV is cached. The last prompt token must
        be, as it yields the first output, and so must the one before ``prompt_start``, as it yields
        the first log-probability."""
        start = self._wanted.prompt_start
        last = self.prompt_len if start < 0 else min(start, self.prompt_len)
        return max(last - 1, 0)

    def resume(self) -> Finish | None:
        """Takes the tokens that an earlier scheduler has delivered. Returns how the request ends if
        they end it."""
        delivered = self.request.delivered or ()
        self.tokens += delivered
        self.prefill_len = self._delivered = len(self.tokens)
        self.replayed = True
        self.deadline = math.inf
        self.reached = len(self.tokens) if delivered else 0
        ends = (self.stopping.after(token) for token in delivered)
        return next((finish for finish in ends if finish is not None), None)

    def page_keys(self, first: int, tokens: int) -> list[bytes]:
        """Keys of the full pages of the first ``tokens`` tokens, from page number ``first`` on."""
        known = len(self._keys)
        if known < tokens:
            self._keys.extend(self.tokens[known : max(tokens, self.prompt_len)])
        return self._keys[first : tokens // self._keys.page_size]

    def lose_rank(self) -> None:
        """The rank on which the request runs is gone with all that was computed there."""
        self.replayed = True
        self.reached = max(self.reached, self.computed)
        self.prefill_len = len(self.tokens)
        self.computed = 0
        self.rank = -1
        self.pages = []
        self.path = []
        self.pages_sent = 0
        self.opened = self.in_flight = False

    # --- steps

    @property
    def _wanted(self) -> Logprobs:
        """The log-probabilities that the request has yet to yield."""
        wanted, taken = self.request.logprobs, len(self._prompt_logprobs)
        if self.request.delivered:  # the prompt's came with them
            return msgspec.structs.replace(wanted, prompt_start=-1)
        if not taken:
            return wanted
        start = wanted.prompt_start + taken
        return msgspec.structs.replace(
            wanted, prompt_start=start if start < self.prompt_len else -1
        )

    def open(self) -> Open:
        """The message that opens the request on its rank. For a request with a grammar,
        ``min_new_tokens`` is left to :meth:`Stopping.bitmask`."""
        by_bitmask = self.stopping.matcher is not None
        sampling = msgspec.structs.replace(
            self.request.sampling,
            min_new_tokens=0 if by_bitmask else self.request.stop.min_new_tokens,
            stop_token_ids=tuple(sorted(self.stopping.stop_tokens)),
        )
        return Open(
            request=self.number,
            prompt_len=self.prompt_len,
            sampling=sampling,
            logprobs=self._wanted,
        )

    def next_row(self, tokens: int, pages_reached: int) -> Row:
        """The request's row of the next step: ``tokens`` more tokens, which lie in the first
        ``pages_reached`` of its pages."""
        start, end = self.computed, self.computed + tokens
        sample = end == len(self.tokens) and (not self.prefill_only or self.wants_next)
        row = Row(
            request=self.number,
            start=start,
            tokens=self.tokens[start:end],
            pages=self.pages[self.pages_sent : pages_reached],
            sample=sample,
            bitmask=self.stopping.bitmask() if sample else None,
        )
        self.computed = end
        self.pages_sent = pages_reached
        self.opened = self.in_flight = True
        return row

    def append(self, token: int, logprobs: TokenLogprobs | None) -> Finish | None:
        """Takes a sampled token; returns how the request ends if this token ends it."""
        self.tokens.append(token)
        if not self.decoding:  # its grammar followed the token after its rank was lost
            self.prefill_len = len(self.tokens)
        if logprobs is not None:
            self._output_logprobs.append(logprobs)
        return self.stopping.after(token)

    def repeat(self, token: int, count: int) -> None:
        """Takes a sampled token ``count`` times, of which none ends the request."""
        self.tokens += [token] * count
        self.stopping.passed(count)

    def append_next(self, logprobs: TokenLogprobs) -> None:
        """Takes the log-probabilities at the last position of a request that ``wants_next``. The
        token that was sampled there is nobody's."""
        self._output_logprobs.append(msgspec.structs.replace(logprobs, token=-1, logprob=None))

    def append_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        self._prompt_logprobs += logprobs

    # --- delivery

    @property
    def deliverable(self) -> int:
        """Output tokens that a stream may show now."""
        return len(self.tokens) - self.stopping.held - self._delivered

    def output(self, finish: Finish | None) -> Output:
        """The output since the last call: what is deliverable, or everything with ``finish``. The
        first one begins with what an earlier scheduler has delivered."""
        count = len(self.tokens) - self._delivered if finish else self.deliverable
        start = self.prompt_len if self._first else self._delivered
        output = Output(
            rid=self.request.rid,
            model=self.model,
            first=self._first,
            token_ids=self.tokens[start : self._delivered + count],
            finish=finish,
            prompt_tokens=self.prompt_len,
            completion_tokens=self._delivered + count - self.prompt_len,
            cached_tokens=self.cached,
            reasoning_tokens=self.stopping.reasoning_tokens,
            output_logprobs=self._output_logprobs[: None if finish else count],
            prompt_logprobs=self._prompt_logprobs if self._first else [],
            timeline=self.timeline if finish else None,
        )
        self._delivered += count
        self._output_logprobs = self._output_logprobs[count:]
        self._first = False
        return output
