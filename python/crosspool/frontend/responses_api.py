"""SGLang's handler of ``/v1/responses``, as one of several that share a store."""

from __future__ import annotations

from typing import Any

from crosspool.frontend.response_store import ResponseStore


def adopt(handler: Any, model: str, store: ResponseStore) -> None:
    """Has ``handler``, which serves ``model``, keep responses in ``store``. Requests that come to
    it are for this model, whatever name they give or leave out."""
    handler.response_store = store.responses
    handler.msg_store = store.conversations
    create = handler.create_responses

    async def create_for_model(request: Any, raw_request: Any = None) -> Any:
        if not request.input:
            return handler.create_error_response("`input` must not be empty", param="input")
        request.model = model
        return await create(request, raw_request)

    handler.create_responses = create_for_model
