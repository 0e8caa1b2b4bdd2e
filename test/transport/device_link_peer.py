"""The other process of test_peer_memory: an FFN rank whose links lie in memory of its own device,
which it exports.

Arguments: file descriptor of the lanes' segment, those that keep memory, deployment as JSON,
device, rounds of each lane, whether CUDA is real. The reply to a dispatch is 2 x + layer +
lane / 4; then the first byte of every link's head is set to 77, as the resident loop's signals
would be."""

import contextlib
import sys

import msgspec
import torch
from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels.dlpack import tensor_at
from crosspool.transport import peer_memory
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.lane_layout import LinkLayout
from crosspool.transport.shared_memory import SharedMemoryTransport

WAIT = 60.0
MAX_ROW_BYTES = 192
DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of models 0 and 1."""


def driver_of(device: Device, real: bool):
    if real:
        from crosspool.kernels.cuda_driver import CudaBindings

        torch.cuda.init()
        return CudaBindings(0)
    from support.fake_cuda_memory import FakeCuda

    return FakeCuda(total=64 << 20, name=device.name)


def serve(
    fd: int,
    kept: KeptDescriptors,
    deployment: Deployment,
    device: Device,
    *,
    rounds: int,
    real: bool,
) -> None:
    driver = driver_of(device, real)
    layout = LinkLayout(deployment.max_step_tokens, MAX_ROW_BYTES)
    with contextlib.ExitStack() as stack:
        links = peer_memory.join(
            deployment, device, layout, driver, kept, resources=stack, timeout=30.0
        )
        transport = SharedMemoryTransport(fd, deployment, device, on_gpu=links)
        ends = [
            transport.ffn_link(attention, lane)
            for attention, other in enumerate(deployment.kv_pool_devices)
            if other != device
            for lane in range(deployment.lanes)
        ]
        left = rounds * len(ends)
        while left:
            news = False
            for end in ends:
                header = end.poll()
                if header is not None:
                    hidden = end.hidden(DTYPES[header.model])
                    end.reply(hidden * 2 + (header.layer + end.lane / 4))
                    news = True
                    left -= 1
            if left and not news and not transport.wait(WAIT):
                sys.exit("no dispatch came: lost wake-up, or the attention rank is gone")
        for end in ends:
            place = links.ffn_place(end.attention_rank, end.lane)
            tensor_at(place.address, (256,), torch.uint8, driver.dlpack_device)[0] = 77
        links.settle()
        print([end.counters.rows for end in ends], flush=True)
        sys.stdin.read()
    if not real:
        assert driver.is_clean


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(
        int(sys.argv[1]),
        KeptDescriptors([int(number) for number in sys.argv[2].split(",")]),
        msgspec.json.decode(sys.argv[3], type=Deployment),
        Device(sys.argv[4]),
        rounds=int(sys.argv[5]),
        real=sys.argv[6] == "real",
    )
