"""Quantises a GGUF file as llama.cpp does, in llama.cpp's environment.

    python -m benchmark.peers.gguf_quantize SOURCE FILE TYPE [THREADS]

TYPE is a name of llama.cpp's, such as Q4_K_M or Q8_0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def quantize(source: Path, path: Path, kind: str, threads: int) -> None:
    """Raises RuntimeError when llama.cpp cannot."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = threads
    part = path.with_name(f"{path.name}.{os.getpid()}")
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(part).encode(), llama_cpp.ctypes.byref(parameters)
    )
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status}")
    part.rename(path)


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int((sys.argv[4:] or ["2"])[0]))
