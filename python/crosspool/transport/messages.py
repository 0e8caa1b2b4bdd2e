"""The control path's messages: between the scheduler and the device processes, over ZMQ.

The scheduler binds one ROUTER; every device process connects a DEALER whose identity is its
device's name and its incarnation, ``cpu:0#2`` for the second process of that device. Each frame is
one msgpack-encoded message of the unions below; messages of one process arrive in the order in
which they were sent, and the device carries them out in that order (so a chunk is mapped before the
step that writes to it).
"""

from __future__ import annotations

import msgspec

from crosspool.config.deployment import ModelConfig
from crosspool.transport.inspection import InspectWhat, RankInfo, Report

PROTOCOL_VERSION = 7
"""The version that :class:`Ready` carries; any change of a message below raises it."""
MAX_MESSAGE_BYTES = 256 << 20
"""A peer that sends more is cut off."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How an attention rank picks a request's next token. The fields are those of SGLang's
    SamplingParams."""

    temperature: float = 1.0
    """0 means that the most likely token is taken."""
    top_k: int = -1
    """-1 means all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """The random draw depends on the seed and the token's position alone."""
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that are barred until ``min_new_tokens`` output tokens exist; the model's eos ids are
    among them."""


class Logprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Which log-probabilities a request wants: log-softmax of the model's own logits, before
    temperature, penalties, bias and grammar."""

    output: bool = False
    prompt_start: int = -1
    """First prompt position whose token's log-probability is wanted; -1 for none."""
    top: int = 0
    """Number of most likely tokens whose log-probabilities are wanted at each position."""
    token_ids: tuple[int, ...] = ()


class Open(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A request comes to live on an attention rank, for the first time or after a restart."""

    request: int
    """The scheduler's number for the request, never used again."""
    prompt_len: int
    """Tokens below this position are the prompt. Penalties count output tokens only, as SGLang's
    do."""
    sampling: Sampling
    logprobs: Logprobs
    """What the request has yet to yield: ``prompt_start`` lies behind what it has yielded."""


class Row(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One request's part of a step: the next tokens of its sequence."""

    request: int
    start: int
    """Position of the first of ``tokens`` in the sequence. A request's first row begins behind any
    full pages that other requests have written for the same tokens."""
    tokens: list[int]
    """A chunk of the prompt, or the one token that was sampled last. After a restart, chunks go on
    over the output that there was."""
    pages: list[int]
    """Pages that the request's page table gains before this step."""
    sample: bool
    """Whether the last position yields a new token (the prompt ends here, or decode)."""
    bitmask: bytes | None = None
    """Tokens that a grammar allows, in xgrammar's layout: bit i of little-endian int32 words."""


class Step(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """One batch of one model through all its layers."""

    step: int
    """The step's number, which grows on each attention rank; the result carries it."""
    model: int
    """The model's number, as in the deployment; so in all messages."""
    map_chunks: list[int]
    """Chunks of the model's virtual range to map before the step."""
    opens: list[Open]
    rows: list[Row]
    lease: int = 1
    """Most steps to make without a further message. Those after the first feed back the token that
    each row sampled last, until a row samples one of its ``stop_token_ids``. If the lease is above
    1, every row samples, no row has a bitmask, and the rows' pages suffice for the whole lease. The
    device may end the lease after any step; every step has a result of its own."""


class Recall(msgspec.Struct, frozen=True, kw_only=True, tag="recall"):
    """End the lease of ``step`` as soon as possible; ignored if the lease has ended."""

    step: int


class Release(msgspec.Struct, frozen=True, kw_only=True, tag="release"):
    """Requests that are over, and chunks that no page of the model in use touches any more."""

    model: int
    requests: list[int]
    unmap_chunks: list[int]


class Wake(msgspec.Struct, frozen=True, kw_only=True, tag="wake"):
    """Read the weights of a model that this device has a share of, its attention part, its FFN
    part or both; :class:`Woken` is the reply. Steps of the model may come at once: the device makes
    each layer as soon as its weights are there."""

    model: int


class Sleep(msgspec.Struct, frozen=True, kw_only=True, tag="sleep"):
    """Give up the weights of a model; :class:`Slept` is the reply. It comes when no device has a
    step of the model in flight, and after the :class:`Woken` of its last :class:`Wake`."""

    model: int


class AddModel(msgspec.Struct, frozen=True, kw_only=True, tag="add_model"):
    """A further model, of which the device may have a share, comes to the fleet; :class:`Added` is
    the reply. The device makes ready for it, without its weights: a :class:`Wake` brings these."""

    model: int
    config: ModelConfig


class RemoveModel(msgspec.Struct, frozen=True, kw_only=True, tag="remove_model"):
    """A model leaves the fleet; :class:`Removed` is the reply, also of a device that does not know
    the model. It comes when no device has a step of the model in flight, and this one has neither
    weights of it nor mapped chunks."""

    model: int


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag="inspect"):
    """A question about the device process; :class:`Inspected` with the same id is the reply."""

    id: int
    what: InspectWhat


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Exit with status 0, once the steps in flight have ended if ``drain`` is set."""

    drain: bool = True
    """False when nobody waits for the steps in flight, and a rank that they need may be dead."""


ToDevice = Step | Recall | Release | Wake | Sleep | AddModel | RemoveModel | Inspect | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Log-probabilities at one position."""

    token: int
    """-1 where no token stands: behind the last one of a request that generates nothing."""
    logprob: float | None
    """None for the first token of a sequence, which nothing precedes, and where no token stands."""
    top: list[tuple[float, int]]
    """Pairs (log-probability, token) of the most likely tokens, the best first."""
    token_ids: list[tuple[float, int]]
    """Pairs (log-probability, token) of the tokens asked for, in the order asked."""


class RowResult(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The result of one row of a step."""

    request: int
    token: int = -1
    """The sampled token; -1 if the row does not sample."""
    output: TokenLogprobs | None = None
    prompt: list[TokenLogprobs] = []
    """Log-probabilities at the row's prompt positions from ``prompt_start`` on, in order."""


class StepResult(msgspec.Struct, frozen=True, kw_only=True, tag="step_result"):
    step: int
    rows: list[RowResult]
    """Results in the order of the step's rows."""
    more: bool = False
    """Whether the step's lease goes on, so that another result with this number follows."""
    refused: bool = False
    """Whether a device has failed to read weights that the step needs: there are no rows, the lease
    has ended, and its requests can go on only after they were opened again."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """A device process has loaded its weights, pre-faulted its pool and joined its peers."""

    version: int
    device: str
    pid: int
    ranks: list[RankInfo]
    models: list[int]
    """Models that the device knows: those of the deployment that it has read."""
    resident: list[int]
    """Models whose weights the device has, of those that it has a share of."""


class Waking(msgspec.Struct, frozen=True, kw_only=True, tag="waking"):
    """How much of a model's weights has been read; it comes a few times a second."""

    model: int
    bytes: int
    total_bytes: int


class Woken(msgspec.Struct, frozen=True, kw_only=True, tag="woken"):
    """The reply to :class:`Wake`: the device has all weights of the model, or none of them."""

    model: int
    error: str | None = None
    """Why the device has none of them, in words for users."""


class Slept(msgspec.Struct, frozen=True, kw_only=True, tag="slept"):
    """The reply to :class:`Sleep`: the memory of the model's weights is free."""

    model: int


class Added(msgspec.Struct, frozen=True, kw_only=True, tag="added"):
    """The reply to :class:`AddModel`: the device is ready for the model, or refuses all steps of it
    until it has left."""

    model: int
    error: str | None = None
    """Why the device cannot take the model, in words for users."""


class Removed(msgspec.Struct, frozen=True, kw_only=True, tag="removed"):
    """The reply to :class:`RemoveModel`: nothing of the model is left."""

    model: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The device process cannot go on and exits, with status 2 for a bad checkpoint, configuration
    or budget; ``message`` is meant for the user."""

    device: str
    message: str


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag="inspected"):
    """The reply to :class:`Inspect`."""

    id: int
    device: str
    report: Report


FromDevice = StepResult | Ready | Waking | Woken | Slept | Added | Removed | Failed | Inspected

_encoder = msgspec.msgpack.Encoder()
_to_device = msgspec.msgpack.Decoder(ToDevice)
_from_device = msgspec.msgpack.Decoder(FromDevice)


def encode(message: ToDevice | FromDevice) -> bytes:
    return _encoder.encode(message)


def decode_to_device(frame: bytes) -> ToDevice:
    """Raises msgspec.ValidationError on anything that is no message for a device."""
    return _to_device.decode(frame)


def decode_from_device(frame: bytes) -> FromDevice:
    """Raises msgspec.ValidationError on anything that is no message from a device."""
    return _from_device.decode(frame)
