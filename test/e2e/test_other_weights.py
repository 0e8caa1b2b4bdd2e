"""Another checkpoint takes the place of a model's while the server answers."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file
from support.fleet import (
    DEEPSEEK,
    FLAGS,
    FOR_TWO,
    GLM,
    QWEN,
    bring,
    do,
    generate,
    take,
    told_of,
    wait_for,
)
from support.server import DEMO, TINY_MODELS, Server
from support.streams import Ask, Load, asks


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the bundled models in a pool for two of them."""
    packed = tmp_path_factory.mktemp("packed")
    packed.chmod(0o700)
    flags = ["--models-dir", str(DEMO), *FLAGS, "--packed-cache-dir", str(packed)]
    flags += ["--weight-pool-bytes", str(FOR_TWO), "--residency-quantum", "0.5"]
    with Server([*flags, "--restart-limit", "100"], models=()) as running:
        yield running


def other_checkpoint(model: str, folder: Path) -> Path:
    """A checkpoint of the same shapes whose weights are others."""
    shutil.copytree(DEMO / model, folder)
    tensors = load_file(folder / "model.safetensors")
    changed = {
        name: tensor.flip(0).contiguous() if "proj" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def update(server: Server, model: str, folder: Path, **more: Any) -> tuple[int, Any]:
    body = {"model_path": str(folder), **more}
    with server.admin() as client:
        answer = client.post(f"/m/{model}/update_weights_from_disk", json=body, timeout=120)
        return answer.status_code, json.loads(answer.text)


@pytest.mark.parametrize("model", [QWEN, GLM])
def test_new_requests_get_the_new_weights_and_running_ones_the_old(
    serving: Server, model: str, tmp_path: Path
) -> None:
    """For a model that is pinned and has no room beside its other weights, and for one on demand,
    beside streams of a third."""
    folder = other_checkpoint(model, tmp_path / f"other-{model}")
    assert bring(serving, "reference", folder)[0] == 201
    new = generate(serving, "reference")["output_ids"]
    assert take(serving, "reference")[0] == 200
    old = generate(serving, model)["output_ids"]
    assert old != new
    keep = "pinned" if model == QWEN else "demand"
    do(serving, "pin", model, {"keep": keep})
    long = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    ask = Ask(model, {"text": "x", "sampling_params": long, "stream": True, "return_logprob": True})
    with_old = ask.tokens(serving)
    load, names = Load(serving, asks([DEEPSEEK], 2, new_tokens=60)), list(told_of(serving))
    begun = threading.Event()
    with load.running(), ThreadPoolExecutor(1) as threads:
        load.flow()
        running = threads.submit(ask.tokens, serving, begun.set)
        assert begun.wait(30)
        status, told = update(serving, model, folder, weight_version="second")
        assert (status, told["success"]) == (200, True), told
        answer = generate(serving, model)
        assert answer["output_ids"] == new and answer["meta_info"]["cached_tokens"] == 0
        assert answer["meta_info"]["weight_version"] == "second"
        assert [token for token, _ in running.result()] == [token for token, _ in with_old]
        load.answer_all()
    assert not load.problems, load.problems[0]
    assert sorted(told_of(serving)) == sorted(names)
    assert told_of(serving)[model]["keep"] == keep
    titles = ("crosspool::device ", "crosspool::scheduler", "crosspool::http")
    for title in titles if model == QWEN else ():  # each reads again who is served
        process = serving.find(title)
        process.kill()
        psutil.wait_procs([process], timeout=10)
        wait_for(serving, lambda: serving.status("/health?strict=1") == 200)
        assert generate(serving, model)["output_ids"] == new
    status, told = update(serving, model, DEMO / model)
    assert status == 200, told
    assert generate(serving, model)["output_ids"] == old
    do(serving, "pin", model, {"keep": "demand"})


def test_the_model_s_own_folder_may_have_changed(serving: Server, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(DEMO / GLM, folder)
    assert bring(serving, "own", folder)[0] == 201
    old = generate(serving, "own")["output_ids"]
    changed = other_checkpoint(GLM, tmp_path / "changed")
    os.replace(changed / "model.safetensors", folder / "model.safetensors")
    assert generate(serving, "own")["output_ids"] == old
    assert update(serving, "own", folder)[0] == 200
    new = generate(serving, "own")["output_ids"]
    assert new != old
    do(serving, "sleep", "own")
    assert generate(serving, "own")["output_ids"] == new
    assert take(serving, "own")[0] == 200


def test_a_checkpoint_that_cannot_be_served_changes_nothing(
    serving: Server, tmp_path: Path
) -> None:
    expected = generate(serving, GLM)["output_ids"]
    cut = other_checkpoint(GLM, tmp_path / "cut")
    weights = cut / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    without_tokenizer = other_checkpoint(GLM, tmp_path / "without")
    for file in without_tokenizer.glob("tokenizer*"):
        file.unlink()
    for folder, text in (
        (cut, "model.safetensors"),
        (without_tokenizer, "tokenizer"),
        (DEMO / DEEPSEEK, "another model"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        status, told = update(serving, GLM, folder)
        assert status == 400 and text in told["error"]["message"], told
        answer = generate(serving, GLM)
        assert answer["output_ids"] == expected and answer["meta_info"]["cached_tokens"] > 0
    assert sorted(told_of(serving)) == sorted(TINY_MODELS)


def test_weights_that_are_found_broken_as_they_are_read_change_nothing(
    serving: Server, tmp_path: Path
) -> None:
    """The checkpoint is gone when its weights are packed, after all checks."""
    expected = generate(serving, GLM)["output_ids"]
    folder = other_checkpoint(GLM, tmp_path / "soon-gone")
    with ThreadPoolExecutor(1) as threads:
        updating = threads.submit(update, serving, GLM, folder)
        device = serving.find("crosspool::device ")
        wait_for(serving, lambda: bool(device.children()) or updating.done(), 30)
        assert not updating.done(), updating.result()
        shutil.rmtree(folder)
        status, told = updating.result()
    assert status == 400 and "weights cannot be read" in told["error"]["message"], told
    answer = generate(serving, GLM)
    assert answer["output_ids"] == expected and answer["meta_info"]["cached_tokens"] > 0
    deadline = time.monotonic() + 30
    while len(serving.get("/crosspool/models")) != len(TINY_MODELS):
        assert time.monotonic() < deadline
    assert serving.status("/health?strict=1") == 200


def test_running_requests_may_be_ended_before(serving: Server, tmp_path: Path) -> None:
    folder = other_checkpoint(GLM, tmp_path / "other")
    body = {"text": "x", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(serving.post, f"/m/{GLM}/generate", body)
        wait_for(serving, lambda: told_of(serving)[GLM]["running"] == 1)
        assert update(serving, GLM, folder, abort_all_requests=True)[0] == 200
        status, told = running.result()
    assert status != 200 or told["meta_info"]["finish_reason"]["type"] == "abort", told
    assert update(serving, GLM, DEMO / GLM)[0] == 200


def test_where_weights_cannot_be_read_again_they_are_not_changed(
    server: Server, tmp_path: Path
) -> None:
    """A server that keeps no packed weights."""
    status, told = update(server, GLM, other_checkpoint(GLM, tmp_path / "other"))
    assert status == 400 and "packed_cache_bytes: 0" in told["error"]["message"], told
    assert generate(server, GLM)
