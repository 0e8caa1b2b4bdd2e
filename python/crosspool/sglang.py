"""SGLang's own programs on an install that has no Triton and no torchvision.

A program imports this module before it imports sglang:

    import crosspool.sglang
    import sglang as sgl

SGLang's commands are run through it, with the same arguments:

    python -m crosspool.sglang launch_server --model-path ...
    python -m crosspool.sglang bench_serving --base-url ...

Where Triton and torchvision are installed this changes nothing.
"""

from __future__ import annotations

import runpy
import sys

from crosspool.frontend import compat

compat.install()

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m crosspool.sglang MODULE [ARGUMENT ...]\n\nruns sglang.MODULE")
    del sys.argv[0]
    # This module stays the main one, which the processes that SGLang spawns import first.
    runpy.run_module(f"sglang.{sys.argv[0]}", run_name="__main__")
