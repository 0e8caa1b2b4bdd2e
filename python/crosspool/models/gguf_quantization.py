"""Says which matrices of a GGUF model are blocks of which type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from crosspool.models.config_file import ConfigFile
from crosspool.models.gguf_blocks import GGUF_BLOCKS, Blocks
from crosspool.models.gguf_config import GGUF
from crosspool.models.gguf_names import GGUFNames
from crosspool.models.schemes import Names, Quantization
from crosspool.models.spec import TensorRef


def gguf_quantization(config: ConfigFile, refs: Iterable[TensorRef]) -> Quantization:
    """Returns how the matrices among ``refs`` are stored in the file that ``config`` was made
    from."""
    stored = config.values[GGUF]
    names = GGUFNames(stored["architecture"], stored["layers"])
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for ref in refs:
        name, _ = names.of(ref.name)
        kind = stored["types"].get(name)
        if kind in GGUF_BLOCKS:
            modules[kind].add(ref.module)
    schemes = tuple(
        (
            Names(modules=frozenset(of_type)),
            Blocks(bits=GGUF_BLOCKS[kind].bits, block=(1, GGUF_BLOCKS[kind].block), type=kind),
        )
        for kind, of_type in sorted(modules.items())
    )
    return Quantization(method="gguf", schemes=schemes, plain=Names(), head=True)
