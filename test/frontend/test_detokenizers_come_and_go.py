"""The detokenizer's models come and go as the scheduler says, and no output is lost with one."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from crosspool.config.deployment import ModelConfig
from crosspool.frontend import private
from crosspool.frontend.detokenizer import Detokenizers
from crosspool.frontend.front_end import FrontEnd
from crosspool.frontend.messages import to_token_id_output
from crosspool.frontend.server_args import port_args
from crosspool.server.admin_socket import AdminSocket
from crosspool.transport.detokenizer_link import (
    AddTokenizer,
    DetokenizerStarted,
    RemoveTokenizer,
    TokenizerAdded,
)
from sglang.srt.managers.io_struct import BatchStrOutput
from support.front_end import MODELS, deployment
from support.server import DEMO
from test_received import outputs, request

NEW = ModelConfig(name="new", path=str(DEMO / MODELS[0]))


class Bed:
    """A detokenizer, and the scheduler and the HTTP process that it speaks to."""

    def __init__(self) -> None:
        self.deployment = deployment()
        self.context: zmq.Context[Any] = zmq.Context()
        self.admin = AdminSocket(self.context, self.deployment.admin_address)
        self.detokenizers = Detokenizers(self.deployment, 1, self.context)
        self.detokenizers.start()
        self.sender, started = self.heard()
        assert started == DetokenizerStarted(incarnation=1, models=[0, 1])

    def until(self, condition: Callable[[], Any]) -> Any:
        """Lets the detokenizer work until the condition is true, and returns its value."""
        deadline = time.monotonic() + 30
        while not (value := condition()):
            assert time.monotonic() < deadline
            self.detokenizers.turn(10)
        return value

    def heard(self) -> Any:
        return self.until(self.admin.receive)

    def tell(self, message: AddTokenizer | RemoveTokenizer) -> None:
        self.admin.reply(self.sender, message)

    def add(self, number: int, config: ModelConfig = NEW) -> TokenizerAdded:
        self.tell(AddTokenizer(model=number, config=config))
        told = self.heard()[1]
        assert isinstance(told, TokenizerAdded)
        return told

    def files(self, number: int) -> list[str]:
        return [file.name for file in Path(self.deployment.runtime_dir).glob(f"m{number}.*")]

    @contextlib.contextmanager
    def front_end(self, number: int) -> Iterator[tuple[FrontEnd, Any]]:
        """The scheduler's end of a model, and the socket at which its texts arrive."""
        ports = port_args(self.deployment.with_model(number, NEW), number)
        with self.context.socket(zmq.PULL) as texts, self.context.socket(zmq.PUSH) as requests:
            texts.bind(ports.tokenizer_ipc_name)
            requests.bind(ports.scheduler_input_ipc_name)
            yield (
                FrontEnd(
                    self.context,
                    number,
                    scheduler_input=ports.scheduler_input_ipc_name,
                    tokenizer=ports.tokenizer_ipc_name,
                    detokenizer=ports.detokenizer_ipc_name,
                    attached=False,
                ),
                texts,
            )

    def close(self) -> None:
        for number in list(self.detokenizers._managers):
            self.detokenizers._remove(number)
        self.context.destroy(linger=0)
        shutil.rmtree(self.deployment.runtime_dir)


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    monkeypatch.setattr(private.io_struct, "_USE_PICKLE_IPC", False)  # as in our processes
    made = Bed()
    yield made
    made.close()


def test_the_last_output_of_a_model_that_goes_arrives(bed: Bed, tokenizers: Any) -> None:
    assert bed.add(7) == TokenizerAdded(model=7)
    assert bed.files(7) == ["m7.detokenizer"]
    assert bed.add(7) == TokenizerAdded(model=7)  # it is there already
    text = " the quick brown fox jumps over the lazy dog"
    prompt, tokens = tokenizers[0].encode(" x"), tokenizers[0].encode(text)
    with bed.front_end(7) as (front_end, texts):
        opened = request(prompt)
        front_end.open(opened)
        for output in outputs(tokens, [2]):
            item = front_end.take(output)
            assert item is not None
            front_end.to_detokenizer(to_token_id_output([item]))
        front_end.part()
        got = ""
        while True:
            frame = bed.until(lambda: texts.poll(0) and texts.recv())
            message = private.decode(frame)
            assert isinstance(message, BatchStrOutput)
            got += message.output_strs[0]
            if message.finished_reasons[0] is not None:
                break
        assert got == text
        bed.until(lambda: not [f for f in bed.files(7) if f.startswith("m7.detok")])


def test_a_tokenizer_that_cannot_be_read_is_refused_and_the_others_live_on(bed: Bed) -> None:
    told = bed.add(5, ModelConfig(name="broken", path="/nowhere"))
    assert told.model == 5 and told.error is not None and "/nowhere" in told.error
    assert bed.files(5) == []
    assert bed.add(6) == TokenizerAdded(model=6)


def test_nothing_is_left_of_models_that_have_gone(bed: Bed) -> None:
    process = psutil.Process()

    def cycle(number: int) -> None:
        assert bed.add(number) == TokenizerAdded(model=number)
        bed.tell(RemoveTokenizer(model=number))
        bed.until(lambda: not bed.files(number))

    def state() -> tuple[int, int]:
        time.sleep(0.2)  # threads end
        return process.num_fds(), process.num_threads()

    for number in range(10, 13):
        cycle(number)
    before = state()
    for number in range(13, 23):
        cycle(number)
    assert state() == before


def test_a_model_that_goes_while_its_tokenizer_is_read_leaves_nothing(bed: Bed) -> None:
    for number in range(30, 35):
        bed.tell(AddTokenizer(model=number, config=NEW))
        bed.tell(RemoveTokenizer(model=number))
    assert bed.add(40) == TokenizerAdded(model=40)  # the answers to the others came before
    bed.until(lambda: not [name for n in range(30, 35) for name in bed.files(n)])
    assert len(os.listdir(bed.deployment.runtime_dir)) > 0
