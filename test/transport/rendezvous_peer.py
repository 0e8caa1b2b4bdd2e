"""The other process of test_rendezvous: a member that brings descriptors of memory, says what it
got, and writes its number into the first member's memory.

Arguments: address, its name, names of all members joined by commas, bytes to bring, and numbers:
for each a memfd of so many bytes is brought, filled with the last letter of its name."""

import os
import sys
from pathlib import Path

from crosspool.transport.rendezvous import Brought, exchange


def main(address: str, me: str, members: str, payload: str, *sizes: str) -> None:
    mine = Brought(payload.encode())
    for size in map(int, sizes):
        descriptor = os.memfd_create("peer")
        os.write(descriptor, me[-1].encode() * size)
        mine.descriptors.append(descriptor)
    with exchange(Path(address), me, members.split(","), mine, 30.0) as found:
        for name, brought in found.items():
            seen = [os.pread(descriptor, 4, 0).decode() for descriptor in brought.descriptors]
            print(name, brought.payload.decode(), *seen)
        for descriptor in found[members.split(",", maxsplit=1)[0]].descriptors:
            os.pwrite(descriptor, me[-1].encode(), 4 + int(me[-1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
