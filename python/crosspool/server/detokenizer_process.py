"""The detokenizer process, of every model.

    python -m crosspool.server.detokenizer_process --deployment FILE

Exit status 0 after SIGTERM, 2 for a user's mistake (told on stderr), 1 for anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from crosspool.config.deployment import Deployment
from crosspool.frontend import compat
from crosspool.server.process import leave, run


def serve(deployment: Deployment) -> None:
    compat.install()
    from crosspool.frontend import detokenizer

    detokenizer.serve(deployment)


def main(argv: Sequence[str] | None = None) -> int:
    return run("detokenizer", serve, argv)


if __name__ == "__main__":
    leave(main())
