"""SGLang's HTTP application of one model, as one of several in a process."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import Any

from sglang.srt import runtime_context
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.parser.template_detection import resolve_auto_parsers
from starlette.exceptions import HTTPException

from crosspool.config.deployment import Deployment
from crosspool.frontend import model_context, private, private_routes, responses_api
from crosspool.frontend.anthropic import Anthropic
from crosspool.frontend.ollama import Ollama
from crosspool.frontend.response_store import ResponseStore
from crosspool.frontend.server_args import port_args, server_args
from crosspool.frontend.shared_metrics import shared_metrics
from crosspool.frontend.tokenizer_manager import PooledTokenizerManager, native_api
from crosspool.frontend.turns import Turns

_SMALL_BODY = 4 << 10
"""Bytes of a body that is checked and tokenized within the event loop: tokenizing takes some
milliseconds then, and checking the schemas of as many tools as it can hold some 50 ms."""


class ModelApp:
    """The application of model ``number``, which keeps responses in ``responses`` and begins work
    in ``turns``. It can be called, as ASGI has it, between :meth:`start` and :meth:`stop`. It asks
    for no keys: the server does, before it calls it. ``incarnation`` is the number of its process
    among those that have had this place, from 1 on: the scheduler still works on requests of
    earlier ones.

    It can be constructed in any thread, but only one at a time. Raises ConfigError for wrong
    SGLang arguments."""

    def __init__(
        self,
        deployment: Deployment,
        number: int,
        incarnation: int,
        responses: ResponseStore,
        turns: Turns,
    ) -> None:
        self.name = deployment.models[number].name
        self.created = int(time.time())
        self._incarnation = incarnation
        self._lifespan = AsyncExitStack()
        self._responses = responses
        self._responses_handler: Any = None
        self._context = model_context.new()
        with model_context.use(self._context), private.making():
            args = server_args(deployment, number)
            resolve_auto_parsers(args)
            runtime_context.publish(args, role="tokenizer")
            if args.enable_metrics:
                collectors = {"tokenizer": shared_metrics()}
                runtime_context.get_context().override("crosspool", stat_loggers=collectors)
            self.manager, templates = init_tokenizer_manager(
                args, port_args(deployment, number), TokenizerManagerClass=PooledTokenizerManager
            )
            self.context_length = self.manager.context_len
            """The longest sequence, in tokens."""
            self.longest_token = self.manager.longest_token
            """Length in bytes of the longest token in the vocabulary."""
            self.vocabulary = self.manager.model_config.vocab_size
            """Number of token ids."""
            self._module = private_routes.take_http_server_copy()
        self.manager.mark(incarnation)
        self.manager.turns = turns
        running = deployment.max_running_requests * len(deployment.attention_ranks(number))
        self.manager.max_outputs = deployment.max_queued_requests + running
        self.manager.max_logprobs = deployment.max_logprobs
        self.manager.startup_time = {}
        self.manager.max_req_input_len = self.context_length - 1
        self._args = args
        self._templates = templates

    async def start(self, max_total_tokens: int) -> None:
        """Prepares the application to serve. ``max_total_tokens`` is what the KV pool could hold of
        this model alone."""
        info = {
            "max_req_input_len": self.manager.max_req_input_len,
            "max_total_num_tokens": max_total_tokens,
        }
        with model_context.use(self._context):
            private_routes.set_state(self._module, self.manager, self._templates, info)
            app = self._module.app
            app.is_single_tokenizer_mode = True
            app.server_args = self._args
            app.warmup_thread_kwargs = {}
            await self._lifespan.enter_async_context(self._module.lifespan(app))
            app.state.ollama_serving = Ollama(self.manager)
            app.state.anthropic_serving = Anthropic(app.state.openai_serving_chat)
            self._keep_responses(app)
            private_routes.take_work_elsewhere(self._module, self.manager.run_in_thread)
            self.manager.auto_create_handle_loop()
            if self._incarnation > 1:
                self.manager.disown_former()
        self.manager.server_status = ServerStatus.Up

    def _keep_responses(self, app: Any) -> None:
        # SGLang logs why, where it cannot serve them.
        self._responses_handler = getattr(app.state, "openai_serving_responses", None)
        if self._responses_handler is not None:
            responses_api.adopt(self._responses_handler, self.name, self._responses)

    @property
    def is_working(self) -> bool:
        """Whether it works on any request, in the background as well."""
        handler = self._responses_handler
        return bool(self.manager.rid_to_state or (handler and handler.background_tasks))

    def works_on(self, response_id: str) -> bool:
        """Whether the model is generating this response in the background."""
        handler = self._responses_handler
        return handler is not None and response_id in handler.background_tasks

    async def stop(self) -> None:
        """Ends the application, with its process."""
        with model_context.use(self._context):
            await self._lifespan.aclose()

    async def close(self) -> None:
        """Ends the application, and gives up what it holds while the process goes on. No request
        may be in progress, and none may come."""
        await self.stop()
        await self.manager.close()
        private_routes.give_copy_back(self._module)

    async def warm_up(self) -> None:
        """Generates one token, through every process. Raises what a client would get."""
        request = GenerateReqInput(
            input_ids=[0],
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            log_metrics=False,
        )
        with model_context.use(self._context):
            async for _ in self.manager.generate_request(request):
                pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        native_api.set(scope["path"] == "/generate")
        if self._responses_handler is None and scope["path"].startswith("/v1/responses"):
            raise HTTPException(503, "/v1/responses cannot be served; the server's log says why")
        private_routes.large_body.set(_has_large_body(scope))
        with model_context.use(self._context):
            await self._module.app(scope, receive, send)


def _has_large_body(scope: Any) -> bool:
    headers = dict(scope["headers"])
    return int(headers.get(b"content-length", _SMALL_BODY + 1)) > _SMALL_BODY
