"""A front end that attaches to a running deployment as a stock SGLang server does, and sends it
whatever a test wants."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import zmq
from crosspool.frontend import private
from crosspool.transport import admin
from sglang.srt.managers import io_struct
from sglang.srt.sampling.sampling_params import SamplingParams

_numbers = itertools.count()


def generate(rid: str, **changes: Any) -> io_struct.TokenizedGenerateReqInput:
    """A request for three tokens; ``changes`` may be fields or sampling parameters."""
    params = {key: changes.pop(key) for key in list(changes) if hasattr(SamplingParams(), key)}
    fields: dict[str, Any] = {
        "input_text": "x",
        "input_ids": array("q", [5, 6, 7]),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(**{"max_new_tokens": 3, **params}),
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
    }
    return io_struct.TokenizedGenerateReqInput(rid=rid, **{**fields, **changes})


class AttachedFrontEnd:
    """Binds the three sockets of one front end and attaches them for ``model``."""

    def __init__(self, admin_address: str, model: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="crosspool-test-", dir="/tmp"))
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        kinds = {"scheduler_input": zmq.PUSH, "tokenizer": zmq.PULL, "detokenizer": zmq.PULL}
        addresses = {name: f"ipc://{self._folder}/{name}" for name in kinds}
        for name, kind in kinds.items():
            socket = self._sockets[name] = self._context.socket(kind)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(addresses[name])
        admin.attach(
            admin_address,
            model=model,
            scheduler_input=addresses["scheduler_input"],
            tokenizer=addresses["tokenizer"],
            detokenizer=addresses["detokenizer"],
        )

    def send(self, *frames: bytes) -> None:
        """Sends one message. Raises zmq.Again when it cannot leave within 30 s."""
        self._sockets["scheduler_input"].setsockopt(zmq.SNDTIMEO, 30_000)
        self._sockets["scheduler_input"].send_multipart(frames)

    def refusals(self, count: int, timeout: float = 10.0) -> dict[str, dict[str, Any]]:
        """The finish reasons of the next ``count`` refused requests, by their ids."""
        found: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(found) < count and time.monotonic() < deadline:
            if self._sockets["tokenizer"].poll(100):
                message = private.decode(self._sockets["tokenizer"].recv())
                found[message.rid] = message.finished_reason
        assert len(found) == count, found
        return found

    def finish(self, rid: str, timeout: float = 20.0) -> dict[str, Any]:
        """The finish reason of request ``rid``; what else is sent is dropped."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            while self._sockets["tokenizer"].poll(0):
                message = private.decode(self._sockets["tokenizer"].recv())
                if getattr(message, "rid", None) == rid:
                    return dict(message.finished_reason)
            if self._sockets["detokenizer"].poll(20):
                message = private.decode(self._sockets["detokenizer"].recv())
                for one, reason in zip(
                    getattr(message, "rids", None) or [],
                    getattr(message, "finished_reasons", None) or [],
                    strict=False,
                ):
                    if one == rid and reason is not None:
                        return dict(reason)
        raise AssertionError(f"{rid} was not answered within {timeout:g} s")

    def serves(self) -> bool:
        """Whether a valid request gets its three tokens."""
        rid = f"valid-{next(_numbers)}"
        self.send(io_struct.msgpack_encode(generate(rid)))
        return self.finish(rid).get("type") == "length"

    def close(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)
