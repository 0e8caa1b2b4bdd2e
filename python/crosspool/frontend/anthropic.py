"""SGLang's Anthropic routes, which also tell the stop sequence that ended an answer, and a client
what is wrong with its request."""

from __future__ import annotations

import json
from typing import Any

from sglang.srt.entrypoints.anthropic.serving import AnthropicServing

from crosspool.frontend import private_routes


@private_routes.passes_errors_on
@private_routes.tells_of_stops
class Anthropic(AnthropicServing):
    """Serves one model's Anthropic routes."""

    def on_answer(self, answer: Any, stop: int | str | None) -> Any:
        """What becomes of an answer; see :func:`private_routes.tells_of_stops`."""
        if isinstance(stop, str) and answer.stop_reason == "end_turn":
            answer.stop_reason, answer.stop_sequence = "stop_sequence", stop
        return answer

    def on_event(self, event: str, stop: int | str | None) -> str:
        """What becomes of an event of a stream; see :func:`private_routes.tells_of_stops`."""
        head, _, data = event.partition("\ndata: ")
        if not isinstance(stop, str) or head != "event: message_delta":
            return event
        message = json.loads(data)
        if message["delta"].get("stop_reason") == "end_turn":
            message["delta"] |= {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return f"{head}\ndata: {json.dumps(message)}\n\n"
