"""The other process of test_shared_memory: an FFN rank that answers until every lane has ended.

Arguments: file descriptor, deployment as JSON, rounds of each lane, spin in nanoseconds. A dispatch
is answered with 2 x + layer + lane / 4. A wait of WAIT seconds without a ring is a failure."""

import sys

import msgspec
import torch
from crosspool.config.deployment import Deployment
from crosspool.transport.shared_memory import SharedMemoryTransport

WAIT = 60.0
DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of models 0 and 1."""


def serve(fd: int, deployment: Deployment, rounds: int, spin_ns: int) -> None:
    device = deployment.weight_pool_devices[0]
    transport = SharedMemoryTransport(fd, deployment, device, spin_ns)
    links = [transport.ffn_link(0, lane) for lane in range(deployment.lanes)]
    left = rounds * len(links)
    while left:
        news = False
        for link in links:
            header = link.poll()
            if header is not None:
                hidden = link.hidden(DTYPES[header.model])
                link.reply(hidden * 2 + (header.layer + link.lane / 4))
                news = True
                left -= 1
        if left and not news and not transport.wait(WAIT):
            sys.exit("no dispatch came: lost wake-up, or the attention rank is gone")
    print([link.counters.rows for link in links])


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(
        int(sys.argv[1]),
        msgspec.json.decode(sys.argv[2], type=Deployment),
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
