"""What becomes of a request when it comes: a sequence, unless it can never be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

from crosspool.config.deployment import Deployment
from crosspool.kvpool.bounds import Bounds
from crosspool.scheduler.request import GenerateRequest
from crosspool.scheduler.sequence import Sequence
from crosspool.scheduler.served_model import ServedModel
from crosspool.scheduler.stopping import Stopping


class Intake:
    """Makes the sequences of requests, and knows how long they may be. ``models`` and ``bounds``
    are those of the models that there are at any time."""

    def __init__(
        self,
        deployment: Deployment,
        models: Mapping[int, ServedModel],
        bounds: Bounds,
        clock: Callable[[], float],
    ) -> None:
        self._deployment = deployment
        self._models = models
        self._bounds = bounds
        self._clock = clock
        self._numbers = count(1)

    def max_tokens(self, model: int) -> int:
        """Longest sequence of ``model`` that can ever be served, in tokens."""
        layout = self._models[model].layout
        tokens = layout.tokens_in(layout.pages_in(self._bounds.reach(model)))
        return min(self._models[model].spec.context, tokens)

    def sequence(self, request: GenerateRequest) -> Sequence:
        """The sequence of ``request``, which has the next number and waits from now on."""
        model, stop = request.model, request.stop
        tools = self._models[model].tools
        prompt_len = len(request.input_ids)
        now = self._clock()
        if stop.max_new_tokens is None:
            limit = self.max_tokens(model)
        else:
            limit = min(prompt_len + stop.max_new_tokens, tools.spec.context)
        stopping = Stopping(
            stop,
            tools.spec,
            limit - prompt_len,
            tools.decoder,
            request.input_ids,
            think_end=tools.think_end if request.thinks_first else (),
        )
        return Sequence(
            next(self._numbers),
            request,
            limit=limit,
            arrived=now,
            deadline=now + self._deployment.queue_timeout,
            stopping=stopping,
            page_size=self._deployment.page_size,
        )

    def too_large(self, seq: Sequence) -> str | None:
        """Why the KV pool can never hold ``seq``, for the client; None when it can."""
        layout = self._models[seq.model].layout
        pages = layout.pages_for(seq.most_tokens)
        if pages <= layout.pages_in(self._bounds.reach(seq.model)):
            return None
        need = pages * layout.page_bytes
        most = self._bounds.reach(seq.model) * self._deployment.chunk_bytes
        return (
            f"prompt and max_new_tokens together are {seq.most_tokens} tokens and need {need} "
            f"bytes of KV cache; the model may have {most} bytes per attention rank, "
            f"enough for {self.max_tokens(seq.model)} tokens"
        )
