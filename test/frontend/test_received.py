"""A request's text and tokens when its detokenizer dies at any point: as if it had not."""

from __future__ import annotations

from array import array
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from crosspool.frontend import private
from crosspool.frontend.messages import OpenRequest, to_token_id_output
from crosspool.frontend.received import Received
from crosspool.frontend.sent import Sent
from crosspool.scheduler.request import Finish, Output
from crosspool.transport.messages import TokenLogprobs
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import BatchTokenIDOutput
from sglang.srt.sampling.sampling_params import SamplingParams

TEXTS = (
    " the quick brown fox",
    " \u4e2d\u6587 and \U0001f98a\U0001f43b, so\u00e9\u0301 \u2028\u4e2d",
    "\ufffd\ufffd a \ufffd",
    " def f(x):\n\treturn x  # \U0001f98a",
)


class Detokenizer(DetokenizerManager):
    """SGLang's, without its sockets."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.decode_status = {}
        self.disable_tokenizer_batch_decode = False
        self.is_tool_call_parser_gpt_oss = False

    def text_of(self, message: BatchTokenIDOutput) -> Any:
        return self.handle_batch_token_id_out(message)


class Manager:
    """What the tokenizer manager gathers of one request."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(output_ids=[], text="", obj=None, positions=[], prompt=[])
        self.state.get_text = lambda: self.state.text
        self.rid_to_state = {"r": self.state}
        self.received = Received(self, "http#1")  # type: ignore[arg-type]

    def take(self, output: Any) -> None:
        if not self.received.cut(output):
            return
        for index, rid in enumerate(output.rids):
            state = self.rid_to_state[rid]
            state.text += output.output_strs[index]
            state.output_ids += output.output_ids[index]
            state.positions += output.output_token_logprobs_val[index]
            state.prompt += output.input_token_logprobs_val[index]
            if output.finished_reasons[index] is not None:
                del self.rid_to_state[rid]


def outputs(tokens: list[int], sizes: list[int]) -> list[Output]:
    """The tokens in pieces of these sizes, over and over."""
    made, done = [], 0
    while done < len(tokens):
        piece = tokens[done : done + sizes[len(made) % len(sizes)]]
        done += len(piece)
        made.append(
            Output(
                rid="r",
                model=0,
                first=not made,
                token_ids=piece,
                finish=Finish(kind="length") if done == len(tokens) else None,
                prompt_tokens=2,
                completion_tokens=done,
                cached_tokens=0,
                output_logprobs=[
                    TokenLogprobs(
                        token=token,
                        logprob=-float(done - len(piece) + place),
                        top=[],
                        token_ids=[],
                    )
                    for place, token in enumerate(piece)
                ],
                prompt_logprobs=[TokenLogprobs(token=1, logprob=-0.5, top=[], token_ids=[])]
                if not made
                else [],
            )
        )
    return made


def request(prompt: list[int]) -> OpenRequest:
    return OpenRequest(
        rid="r",
        http_worker_ipc="http#1",
        prompt_tail=array("q", prompt),
        prompt_len=len(prompt),
        stream=True,
        stream_interval=1,
        params=SamplingParams(),
        logprobs=True,
        top=0,
        token_ids=(),
    )


def copied(item: tuple[OpenRequest, Output]) -> Any:
    """A message with this item, which has been on a socket."""
    message = private.decode(private.io_struct.msgpack_encode(to_token_id_output([item])))
    return message


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sizes", [[1], [2, 1], [3]])
def test_a_detokenizer_that_dies_anywhere(tokenizers: Any, text: str, sizes: list[int]) -> None:
    """``taken`` outputs have arrived, the one after them may have been lost in the detokenizer, and
    the next detokenizer is told of what was sent until then."""
    for tokenizer in tokenizers:
        encode = partial(tokenizer.encode, add_special_tokens=False)
        prompt, tokens = encode(" x"), encode(text)
        pieces = outputs(tokens, sizes)
        for taken in range(len(pieces) + 1):
            for sent_count in {taken, min(taken + 1, len(pieces)), len(pieces)}:
                manager, sent, opened = Manager(), Sent(), request(prompt)
                first, second = Detokenizer(tokenizer), Detokenizer(tokenizer)
                for index, piece in enumerate(pieces[:sent_count]):
                    sent.add(opened, piece)
                    if index < taken:
                        manager.take(first.text_of(copied((opened, piece))))
                for item in sent.items():
                    manager.take(second.text_of(copied(item)))
                for piece in pieces[sent_count:]:
                    sent.add(opened, piece)
                    manager.take(second.text_of(copied((opened, piece))))
                state = manager.state
                assert state.output_ids == tokens
                assert (
                    state.text == tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
                )
                assert state.positions == [-float(place) for place in range(len(tokens))]
                assert state.prompt == [-0.5]
                assert "r" not in manager.rid_to_state
                sent.confirm(manager.received.take_ended())
                assert len(sent) == 0
