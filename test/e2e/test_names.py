"""Models whose names have slashes, of which one begins with the other."""

from __future__ import annotations

import urllib.parse

import pytest
from support.server import DEMO, SLASHED_NAMES, TINY_MODELS, Server

GREEDY = {"temperature": 0, "max_new_tokens": 4}


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_name_with_slashes_is_found_in_the_path(
    host_server: Server, index: int, encoded: bool
) -> None:
    name = urllib.parse.quote(SLASHED_NAMES[index], safe="" if encoded else "/")
    assert host_server.get(f"/m/{name}/model_info")["model_path"] == str(DEMO / TINY_MODELS[index])
    body = {"text": "The import statement", "sampling_params": GREEDY}
    status, native = host_server.post(f"/m/{name}/generate", body)
    assert status == 200, native
    said = {"prompt": "The import statement", "max_tokens": 4, "temperature": 0}
    status, answer = host_server.post("/v1/completions", {**said, "model": SLASHED_NAMES[index]})
    assert status == 200 and answer["choices"][0]["text"] == native["text"]
    status, answer = host_server.post(
        f"/m/{name}/v1/completions", {**said, "model": SLASHED_NAMES[index]}
    )
    assert status == 200 and answer["choices"][0]["text"] == native["text"]
    assert host_server.get(f"/v1/models/{name}")["id"] == SLASHED_NAMES[index]


def test_a_name_that_only_begins_alike_is_no_model(host_server: Server) -> None:
    status, answer = host_server.post("/m/Org/tin/generate", {"text": "x"})
    assert status == 404 and answer["error"]["code"] == "model_not_found"
