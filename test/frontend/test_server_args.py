"""What SGLang gets to know of a deployment: that its secrets are set, and nothing of how weights
are stored."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from crosspool.config.deployment import ModelConfig
from crosspool.config.sglang_flags import BY_NAME, HIDDEN
from crosspool.frontend.server_args import server_args
from make_random_checkpoint import make_random_checkpoint
from sglang.srt.configs import model_config
from sglang.srt.server_args import ServerArgs
from support.front_end import MODELS, deployment
from support.server import DEMO

CANARY = "canary-97531"
SECRET = re.compile(r"password|secret|credential|(^|_)key(_|$)|(^|_)token$")
"""Names of secrets among the arguments; a plural, or more words after ``token``, counts tokens."""


@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
def test_server_args_hold_no_key(name: str) -> None:
    args = server_args(deployment(sglang={name: CANARY}), 0)
    assert getattr(args, name) == HIDDEN
    assert args.served_model_name == MODELS[0]
    dumped = pickle.dumps(args)
    assert HIDDEN.encode() in dumped and CANARY.encode() not in dumped
    for shown in (repr(args), repr(args.resolved_dict()), str(args.launch_command)):
        assert CANARY not in shown


def test_every_secret_that_sglang_has_is_refused_or_marked() -> None:
    names = [field.name for field in msgspec.structs.fields(ServerArgs)]
    secrets = [name for name in names if SECRET.search(name)]
    assert {"api_key", "admin_api_key", "ssl_keyfile_password"} <= set(secrets)
    taken = {name for name in secrets if name in BY_NAME}
    assert taken == {name for name, flag in BY_NAME.items() if flag.is_secret}


def test_models_with_recurrent_state_have_no_prefix_cache(tmp_path: Path) -> None:
    path = make_random_checkpoint(
        "qwen3_next", tmp_path / "next", tokenizer=DEMO / "tiny-qwen3-moe"
    )
    served = deployment()
    assert served.prefix_cache and not server_args(served, 0).disable_radix_cache
    model = ModelConfig(name="next", path=str(path))
    args = server_args(deployment(models={0: model}, next_model=1), 0)
    assert args.disable_radix_cache


@pytest.mark.parametrize(
    "quantization",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    ],
)
def test_quantised_checkpoints_are_like_others(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    path = Path(shutil.copytree(DEMO / MODELS[0], tmp_path / "quantised"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | quantization))
    models = {0: ModelConfig(name="quantised", path=str(path))}
    args = server_args(deployment(models=models, next_model=1), 0)
    assert model_config.ModelConfig.from_server_args(args).quantization is None
