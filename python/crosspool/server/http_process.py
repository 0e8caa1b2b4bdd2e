"""The HTTP process: SGLang's tokenizer manager and application of every model behind one port.

The first of a deployment listens at once; ``/health`` gives 503 until all processes are ready and
all models that are not asleep have generated a token. One that takes the place of a dead one lets
connections wait, for some seconds at most, until it can serve them, and has the dead one's requests
aborted. After SIGTERM, requests in flight have ``drain_timeout`` seconds to finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn
import uvloop
import zmq.asyncio

from crosspool.config.deployment import Deployment
from crosspool.config.process import freeze_heap
from crosspool.frontend import compat
from crosspool.frontend.response_store import ResponseStore
from crosspool.observability.bounded_log import BoundedLog
from crosspool.server import connections
from crosspool.server.app import App
from crosspool.server.listeners import Listeners
from crosspool.server.liveness import CannotServe, Liveness
from crosspool.server.model_apps import ModelApps
from crosspool.server.registration import Registration
from crosspool.server.state import State
from crosspool.transport import admin, notices
from crosspool.transport.inspection import Status

if TYPE_CHECKING:
    from crosspool.frontend.model_app import ModelApp

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

_STATUS_SECONDS = 0.5
_ANSWER_SECONDS = 1.0
"""Time that the scheduler gets to answer before it counts as silent."""
_JUDGE_SECONDS = 0.2
_KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: longer than clients and proxies keep theirs, since a
request that meets a closing connection is lost (aiohttp gives up after 15 s, openai after 5)."""
_LINGER_SECONDS = 5
"""Time for open connections to close after the last request has ended."""
_UNSEEN_SECONDS = 10
"""Time for which connections wait for the process that takes the place of a dead one; later, health
checks hear that it starts, and requests still wait."""
_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Leaves signals to HttpProcess, which drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpProcess:
    """``incarnation`` is its number among the deployment's HTTP processes, from 1 on; it alone may
    close ``listeners``."""

    def __init__(self, deployment: Deployment, incarnation: int, listeners: Listeners) -> None:
        self._deployment = deployment
        self._incarnation = incarnation
        self._listeners = listeners
        self._state = State()
        self._context = zmq.asyncio.Context()
        self._scheduler = admin.AsyncAdmin(self._context, deployment.admin_address)
        self._apps = ModelApps(deployment, self._state, self._scheduler, self._make_app)
        self._following: asyncio.Task[None] | None = None
        """Makes and ends applications; None while the fleet has not changed."""
        self._registration = (
            None if deployment.router_url is None else Registration(deployment, self._state.names)
        )
        self._app = App(deployment, self._state, self._scheduler, self._apps, self._registration)
        self._liveness = Liveness(deployment.watchdog_timeout, time.monotonic)
        self._notices = notices.bind(self._context, deployment.notice_address)
        self._prepared = asyncio.Event()
        self._responses = ResponseStore(
            deployment.response_store_size, deployment.response_store_bytes
        )
        self._warms_up = incarnation == 1 and not deployment.sglang.get("skip_server_warmup")
        self._failed = False
        """Whether requests in flight have been ended, and later ones are refused."""
        self._ending = asyncio.Event()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT. Raises ConfigError when a model's arguments are wrong,
        and CannotServe."""
        level = self._deployment.sglang.get("log_level_http") or self._deployment.sglang.get(
            "log_level", "info"
        )
        server = _Server(
            uvicorn.Config(
                self._app,
                ws="none",
                log_level=level,
                log_config=None,
                access_log=level == "debug",
                backlog=_BACKLOG,
                lifespan="off",
                http=connections.protocol(self._deployment),
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LINGER_SECONDS,
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        serving = asyncio.create_task(self._serve(server))
        prepare = asyncio.create_task(self._prepare())
        watch = asyncio.create_task(self._watch())
        ending = asyncio.create_task(self._ending.wait())
        try:
            await _first_of(ending, serving, prepare, watch)
            await asyncio.gather(self._drain(), self._take_back())
        finally:
            for task in (prepare, watch, ending):
                task.cancel()
            if self._ending.is_set():
                self._listeners.refuse()
            server.should_exit = True
            await serving
            for app in self._apps.apps:
                await app.stop()
            self._context.destroy(linger=0)
            if self._deployment.sglang.get("enable_trace"):
                from crosspool.frontend import private

                private.last_spans()

    async def _serve(self, server: _Server) -> None:
        if self._incarnation > 1:
            waits = [asyncio.create_task(event.wait()) for event in (self._prepared, self._ending)]
            await asyncio.wait(waits, timeout=_UNSEEN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        await server.serve(sockets=[self._listeners.public, self._listeners.admin])

    def _on_signal(self) -> None:
        self._state.draining = True
        self._state.message = "the server is shutting down"
        self._ending.set()

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._deployment.drain_timeout
        if self._state.in_flight:
            log.info(
                "%d requests in flight have %g s to finish",
                self._state.in_flight.total(),
                self._deployment.drain_timeout,
            )
        while self._state.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._state.in_flight:
            log.warning("%d requests did not finish in time", self._state.in_flight.total())

    async def _take_back(self) -> None:
        if self._registration is not None:
            await self._registration.end()

    async def _register(self) -> None:
        """Keeps the models registered at the deployment's router, if it has one."""
        if self._registration is not None:
            await self._prepared.wait()
            await self._registration.run()

    async def _prepare(self) -> None:
        """Imports SGLang and, in the first HTTP process, has every model whose weights are in the
        pools generate a token. Never returns by itself."""
        self._state.message = "importing SGLang"
        self._state.recovers = self._incarnation > 1
        await asyncio.to_thread(compat.install)
        apps = await self._first_apps()
        while (status := self._state.status) is None or not status.ready:
            self._state.message = status.message if status else "waiting for the scheduler"
            await asyncio.sleep(0.05)
        self._state.message = "warming up"
        await self._start(apps, status)
        freeze_heap()
        self._apps.begin(apps)
        del apps  # or those of models that go would stay
        self._state.message = "ready"
        self._state.ready, self._state.recovers = True, False
        self._prepared.set()
        log.info("ready on http://%s:%d", self._deployment.host, self._deployment.port)
        await asyncio.Event().wait()

    async def _first_apps(self) -> dict[int, ModelApp]:
        # Here, because SGLang may be imported only once compat is installed.
        from crosspool.frontend.server_args import remove_left_sockets

        apps = {}
        for number, config in self._deployment.models.items():
            self._state.message = f"preparing {config.name}"
            try:
                apps[number] = await asyncio.to_thread(self._make_app, self._deployment, number)
            except Exception as error:
                if self._incarnation == 1:
                    raise
                log.error("model %s cannot be served any more: %r", config.name, error)
                self._apps.has_problem(number, str(error) or repr(error))
        remove_left_sockets(self._deployment, apps, "scheduler", "tokenizer")
        return apps

    async def _start(self, apps: Mapping[int, ModelApp], status: Status) -> None:
        told = {model.model: model for model in status.models}
        for number, app in apps.items():
            now = told.get(number)  # None: the model has been unloaded since
            token_bytes = now.kv_bytes_per_token if now else 1
            await app.start(self._deployment.kv_pool_bytes // token_bytes)
            if now and now.residency.state == "resident" and self._warms_up:
                await app.warm_up()

    def _make_app(self, deployment: Deployment, number: int) -> ModelApp:
        from crosspool.frontend.model_app import ModelApp

        return ModelApp(deployment, number, self._incarnation, self._responses, self._state.turns)

    async def _watch(self) -> None:
        """Keeps the status fresh and notices when the deployment cannot serve. Raises CannotServe
        when it never will again, after ``failure_grace`` seconds in which clients get 503."""
        await asyncio.gather(
            self._ask(), self._listen_to_launcher(), self._judge(), self._register()
        )

    async def _ask(self) -> None:
        while True:
            try:
                status = self._state.status = await self._scheduler.status(timeout=_ANSWER_SECONDS)
            except admin.AdminError:
                # Not the time that has passed, of which this process may have used much itself.
                if self._prepared.is_set():
                    self._liveness.silent(_ANSWER_SECONDS)
                continue
            if self._prepared.is_set():
                self._liveness.answered(status, _STATUS_SECONDS)
                self._follow_fleet(status)
            await asyncio.sleep(_STATUS_SECONDS)

    def _follow_fleet(self, status: Status) -> None:
        """Has applications made and ended where the scheduler serves others: a process in whose
        place this one is may have had them loaded."""
        if self._following is not None and self._following.done():
            if not self._following.cancelled() and (error := self._following.exception()):
                bounded.error("the fleet cannot be followed: %r", error)
            self._following = None
        if self._following is None and status.ready and not self._apps.are_those_of(status):
            self._following = asyncio.create_task(self._apps.follow())

    async def _listen_to_launcher(self) -> None:
        while True:
            frames = await self._notices.recv_multipart()
            try:
                (frame,) = frames
                self._liveness.told(notices.decode(frame))
            except (ValueError, msgspec.DecodeError, RecursionError) as error:
                bounded.error("dropped what is no notice of the launcher's: %s", error)

    async def _judge(self) -> None:
        await self._prepared.wait()
        while self._liveness.lost is None:
            problem = self._liveness.problem
            if problem is not None and self._liveness.is_long:
                self._fail(problem)
            self._tell_clients(problem)
            await asyncio.sleep(_JUDGE_SECONDS)
        self._tell_clients(self._liveness.lost)
        self._fail(self._liveness.lost)
        await asyncio.sleep(self._deployment.failure_grace)
        if not self._liveness.launcher_knows:
            raise CannotServe(self._liveness.lost)
        await asyncio.Event().wait()  # for the launcher's signal

    def _tell_clients(self, problem: str | None) -> None:
        """Has ``/health`` and new requests answered with 503 while there is a ``problem``."""
        if problem is None:
            if not self._state.ready:
                log.info("all is well again")
                self._resume()
        elif self._state.ready:
            log.error("%s: no new request is taken", problem)
        if not self._state.draining:
            self._state.message = problem or "ready"
        self._state.recovers = self._liveness.restarts
        self._state.ready = problem is None

    def _fail(self, cause: str) -> None:
        """Ends every request in flight with 503."""
        if self._failed:
            return
        self._failed = True
        log.error("%s: every request ends with 503", cause)
        for app in self._apps.apps:
            app.manager.fail_all(cause, 503)

    def _resume(self) -> None:
        self._failed = False
        for app in self._apps.apps:
            app.manager.resume()


async def _first_of(ending: asyncio.Task[Any], *tasks: asyncio.Task[Any]) -> None:
    """Returns when ``ending`` is done; raises what any of ``tasks`` raises."""
    done, _ = await asyncio.wait([ending, *tasks], return_when=asyncio.FIRST_COMPLETED)
    if ending not in done:
        done.pop().result()
        raise RuntimeError("the HTTP server stopped by itself")


def serve(deployment: Deployment, incarnation: int, listeners: Listeners) -> None:
    async def main() -> None:
        await HttpProcess(deployment, incarnation, listeners).run()

    uvloop.run(main())
