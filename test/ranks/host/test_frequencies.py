"""The frequencies of rotations, and what is imported to compute them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.kernels.rope import rope_frequencies
from crosspool.models.registry import read_model
from crosspool.ranks.host.attention import frequencies
from make_random_checkpoint import FAMILIES
from support.server import DEMO, TINY_MODELS
from transformers import AutoConfig

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "base": {"rope_theta": 500},
    "base beside parameters": {"rope_theta": 500, "rope_parameters": {"rope_type": "default"}},
    "base in parameters": {"rope_theta": 5, "rope_parameters": {"rope_theta": 7e5}},
    "scaling": {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "scaling without a type": {"rope_theta": 500, "rope_scaling": {"factor": 4.0}},
    "scaling beside parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500},
        "rope_scaling": LLAMA3 | {"rope_theta": 900, "original_max_position_embeddings": 64},
    },
}
REFUSED = {
    # transformers would scale the rotations
    ("gpt_oss", "base"): "rope_theta=500: must come with rope_scaling",
    ("phimoe", "scaling"): "rope_type must be one of default, longrope",
    ("phimoe", "scaling beside parameters"): "rope_type must be one of default, longrope",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_are_transformers(family: str, spelling: str, tmp_path: Path) -> None:
    fields = {"model_type": family, "dtype": "float32", **FAMILIES[family], **SPELLINGS[spelling]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if (problem := REFUSED.get((family, spelling))) is not None:
        with pytest.raises(ConfigError, match=problem):
            read_model(tmp_path)
        return
    spec = read_model(tmp_path)
    found, scaling = frequencies(spec, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    expected, expected_scaling = rope_frequencies(config, spec.attention.rope.dim)
    assert torch.equal(found, expected)
    assert scaling == expected_scaling


def test_the_frequencies_of_a_plain_config_take_no_import_of_transformers() -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from crosspool.models.registry import read_model;"
        "from crosspool.ranks.host.attention import frequencies;"
        "[frequencies(read_model(path), path) for path in map(Path, sys.argv[1:])];"
        "assert 'transformers' not in sys.modules"
    )
    folders = [str(DEMO / name) for name in TINY_MODELS]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, timeout=120)
