"""The other process of test_rendezvous: a member that says what it got.

Arguments: address, its name, names of all members joined by commas, and what it brings."""

import sys
from pathlib import Path

from crosspool.transport.rendezvous import exchange


def main(address: str, me: str, members: str, mine: str) -> None:
    found = exchange(Path(address), me, members.split(","), mine.encode(), 30.0)
    for name, brought in found.items():
        print(name, brought.decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
