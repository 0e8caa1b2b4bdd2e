"""What the deployment's own HTTP process and the scheduler tell each other beside SGLang's
messages, and in order with them."""

from __future__ import annotations

from sglang.srt.managers import io_struct


class Delivered(io_struct.BaseBatchReq):
    """The ends of the requests ``rids`` have come: what was sent of them need not be kept."""


class SchedulerReplaced(io_struct.BaseReq):
    """The scheduler is a new one, which knows of no request. It hears nothing before a
    :class:`Disown`, which is to be followed by all that is still to be done."""

    incarnation: int
    """Its number among the deployment's schedulers."""


class ModelGone(io_struct.BaseReq):
    """The model is not served any more, and there is no output behind this. The detokenizer alone
    gets it."""


class Resume(io_struct.BaseReq):
    """Go on with a request that an earlier scheduler had taken."""

    message: io_struct.TokenizedGenerateReqInput
    output_ids: list[int]
    """The output tokens that have come."""


class Disown(io_struct.BaseReq):
    """The HTTP process is a new one, or has heard of a new scheduler. Nobody waits for what was
    asked before, and nobody knows that a model was paused."""
