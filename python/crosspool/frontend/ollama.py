"""SGLang's Ollama routes, with what they lack.

In SGLang 0.5.21 ``/api/chat`` fails with transformers 5, whose chat templates return more than
token ids; a stream leaves out the text of its last piece; and a request that is refused is a 500.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import jinja2
import msgspec
from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from sglang.srt.entrypoints.ollama import protocol
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.requests import Request

from crosspool.frontend.private_routes import large_body

_OPTIONS: dict[str, tuple[str, type, str]] = {
    "temperature": ("temperature", float, "a number"),
    "top_p": ("top_p", float, "a number"),
    "top_k": ("top_k", int, "an integer"),
    "min_p": ("min_p", float, "a number"),
    "repeat_penalty": ("repetition_penalty", float, "a number"),
    "presence_penalty": ("presence_penalty", float, "a number"),
    "frequency_penalty": ("frequency_penalty", float, "a number"),
    "num_predict": ("max_new_tokens", int, "an integer"),
    "stop": ("stop", list[str], "a list of strings"),
    "seed": ("sampling_seed", int, "an integer"),
}
"""SGLang's name of each of Ollama's options, and its type; other options have no effect."""
_MAX_NEW_TOKENS = 2048
"""Most output tokens where ``num_predict`` is not given, as in SGLang."""


class Ollama(OllamaServing):
    """Serves one model's Ollama routes."""

    async def handle_chat(self, request: protocol.OllamaChatRequest, raw_request: Request) -> Any:
        messages = [{"role": one.role, "content": one.content} for one in request.messages]
        manager = self.tokenizer_manager
        apply = functools.partial(
            manager.tokenizer.apply_chat_template,
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        try:
            prompt = await manager.run_in_thread(apply) if large_body.get() else apply()
        except (ValueError, TypeError, IndexError, jinja2.TemplateError) as error:
            text = f"the chat template does not take these messages: {error}"
            raise HTTPException(400, text) from None

        def message(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}}

        return await self._answer(request, raw_request, {"input_ids": prompt}, message)

    async def handle_generate(
        self, request: protocol.OllamaGenerateRequest, raw_request: Request
    ) -> Any:
        if not request.prompt.strip() and not request.system:
            return await super().handle_generate(request, raw_request)
        prompt = f"{request.system}\n\n{request.prompt}" if request.system else request.prompt
        return await self._answer(
            request, raw_request, {"text": prompt}, lambda text: {"response": text}
        )

    async def _answer(
        self,
        request: Any,
        raw_request: Request,
        prompt: dict[str, Any],
        content: Callable[[str], dict[str, Any]],
    ) -> Any:
        """The answer to ``request``: one object, or a stream of them, each with the fields of
        ``content`` of the text in it. Raises HTTPException for a request that is refused."""
        generate = GenerateReqInput(
            **prompt, sampling_params=_sampling_params(request), stream=request.stream
        )
        start = time.monotonic_ns()
        outputs = self.tokenizer_manager.generate_request(generate, raw_request)
        try:
            output = await anext(outputs)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

        def answer(output: dict[str, Any], text: str) -> dict[str, Any]:
            head = {
                "model": self.tokenizer_manager.served_model_name,
                "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                **content(text),
            }
            meta = output["meta_info"]
            if meta["finish_reason"] is None:
                return {**head, "done": False}
            return {
                **head,
                "done": True,
                "done_reason": meta["finish_reason"]["type"],
                "total_duration": time.monotonic_ns() - start,
                "prompt_eval_count": meta["prompt_tokens"],
                "eval_count": meta["completion_tokens"],
            }

        if not request.stream:
            return answer(output, output["text"])

        async def pieces() -> AsyncIterator[bytes]:
            piece, said = output, 0
            while piece is not None:
                text = piece["text"]
                yield json.dumps(answer(piece, text[said:])).encode() + b"\n"
                said = len(text)
                piece = await anext(outputs, None)

        return StreamingResponse(
            pieces(),
            media_type="application/x-ndjson",
            background=self.tokenizer_manager.create_abort_task(generate),
        )


def _sampling_params(request: Any) -> dict[str, Any]:
    """SGLang's sampling parameters for Ollama's ``options`` and ``format``. Raises HTTPException
    for an option of the wrong type."""
    params: dict[str, Any] = {"max_new_tokens": _MAX_NEW_TOKENS}
    for name, (ours, kind, what) in _OPTIONS.items():
        value = (request.options or {}).get(name)
        if value is None:
            continue
        if name == "stop" and isinstance(value, str):
            value = [value]
        try:
            params[ours] = msgspec.convert(value, kind)
        except msgspec.ValidationError:
            raise HTTPException(400, f"`options.{name}` must be {what}") from None
    if params["max_new_tokens"] < 0:  # as many as fit, in Ollama's words
        params["max_new_tokens"] = None
    if request.format is not None:
        schema = {"type": "object"} if request.format == "json" else request.format
        params["json_schema"] = json.dumps(schema)
    return params
