"""Models whose names have slashes, of which one begins with the other."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator

import pytest
from support.server import DEMO, TINY_MODELS, Server

NAMES = ("Org/tiny", "Org/tiny/moe-1.5")
GREEDY = {"temperature": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ["--kv-pool-bytes", "64MiB"]
    for name, folder in zip(NAMES, TINY_MODELS, strict=False):
        flags += ["--model-path", str(DEMO / folder), "--served-model-name", name]
    with Server(flags, models=()) as running:
        yield running


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_name_with_slashes_is_found_in_the_path(
    server: Server, index: int, encoded: bool
) -> None:
    name = urllib.parse.quote(NAMES[index], safe="" if encoded else "/")
    assert server.get(f"/m/{name}/model_info")["model_path"] == str(DEMO / TINY_MODELS[index])
    body = {"text": "The import statement", "sampling_params": GREEDY}
    status, native = server.post(f"/m/{name}/generate", body)
    assert status == 200, native
    said = {"prompt": "The import statement", "max_tokens": 4, "temperature": 0}
    status, answer = server.post("/v1/completions", {**said, "model": NAMES[index]})
    assert status == 200 and answer["choices"][0]["text"] == native["text"]
    status, answer = server.post(f"/m/{name}/v1/completions", {**said, "model": NAMES[index]})
    assert status == 200 and answer["choices"][0]["text"] == native["text"]
    assert server.get(f"/v1/models/{name}")["id"] == NAMES[index]


def test_a_name_that_only_begins_alike_is_no_model(server: Server) -> None:
    status, answer = server.post("/m/Org/tin/generate", {"text": "x"})
    assert status == 404 and answer["error"]["code"] == "model_not_found"
