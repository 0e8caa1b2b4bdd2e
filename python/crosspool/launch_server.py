"""Starts a server, as SGLang's module of this name does:

python -m crosspool.launch_server --model-path A --model-path B --kv-pool-bytes 2GiB
"""

from __future__ import annotations

import sys

from crosspool.cli.main import run

if __name__ == "__main__":
    sys.exit(run("serve", sys.argv[1:], "crosspool.launch_server"))
