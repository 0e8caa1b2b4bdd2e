"""What the deployment's own HTTP process tells the scheduler beside SGLang's messages, and in order
with them."""

from __future__ import annotations

from sglang.srt.managers import io_struct


class Delivered(io_struct.BaseBatchReq):
    """The ends of the requests ``rids`` have come: what was sent of them need not be kept."""


class Disown(io_struct.BaseReq):
    """The HTTP process is a new one. Nobody waits for the requests of the one before it, and nobody
    knows that it had paused a model."""
