"""The folder from which SGLang's front end reads a model's config and tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from crosspool.config.deployment import Deployment
from crosspool.models.gguf_config import GGUF, config_of
from crosspool.models.gguf_header import gguf_files, read_header
from crosspool.models.gguf_tokenizer import GGUFTokenizer
from crosspool.models.registry import family_of


def model_folder(deployment: Deployment, number: int) -> Path:
    """Returns the folder of model ``number``. For a GGUF file it is one in the runtime folder, in
    which whoever comes first writes what the file says.

    Raises ConfigError when the file cannot be read, or has no tokenizer that is supported while
    the model has no ``tokenizer_path``."""
    model = deployment.models[number]
    path = Path(model.path)
    if not gguf_files(path):
        return path
    folder = Path(deployment.runtime_dir) / f"m{number}.folder"
    if folder.is_dir():
        return folder
    own_tokenizer = "tokenizer_path" not in {**deployment.sglang, **model.sglang}
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=deployment.runtime_dir))
    try:
        for name, fields in _files(path, own_tokenizer).items():
            (made / name).write_text(json.dumps(fields))
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _files(path: Path, own_tokenizer: bool) -> dict[str, dict[str, Any]]:
    config = config_of(path)
    family = family_of(config)
    assert family is not None
    left_out = {GGUF}
    if (config.values.get("rope_scaling") or {}).get("type") == "divided":
        left_out.add("rope_scaling")  # which no config.json has
    fields = {name: value for name, value in config.values.items() if name not in left_out}
    files = {"config.json": fields | {"architectures": [family.architecture]}}
    names = ("eos_token_id", "bos_token_id")
    files["generation_config.json"] = {k: v for k, v in fields.items() if k in names}
    if own_tokenizer:
        tokenizer = GGUFTokenizer(read_header(gguf_files(path)))
        files["tokenizer.json"] = tokenizer.tokenizer_json()
        files["tokenizer_config.json"] = tokenizer.config()
    return files
