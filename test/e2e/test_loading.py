"""Models that are loaded and unloaded while a whole server answers for others."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from crosspool.config.runtime_dir import find_running
from support.fleet import DEEPSEEK, GLM, QWEN, bring, generate, take, told_of
from support.server import DEMO, Server
from support.streams import Load, asks


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves one model; the weight pool holds any two of the bundled ones."""
    packed = tmp_path_factory.mktemp("packed")
    packed.chmod(0o700)
    flags = ["--dtype", "float32", "--kv-pool-bytes", "64MiB", "--weight-pool-bytes", "11500000"]
    flags += ["--packed-cache-dir", str(packed), "--packed-cache-bytes", "1GiB"]
    flags += ["--restart-limit", "100"]
    with Server(flags, models=[QWEN]) as running:
        yield running


def is_as_at_the_start(server: Server) -> bool:
    return list(told_of(server)) == [QWEN] and list(find_running(server.port).names) == [0]


def test_a_loaded_model_gives_the_tokens_of_one_of_the_start(
    changing: Server, server: Server
) -> None:
    for model in (DEEPSEEK, GLM):
        status, told = bring(changing, f"new/{model}", model)
        assert (status, told["state"], told["kv_bytes"]) == (201, "asleep", 0), told
        expected = generate(server, model)["output_ids"]
        assert generate(changing, f"new/{model}")["output_ids"] == expected
        assert told_of(changing)[f"new/{model}"]["wakes"] == 1
    assert generate(changing, QWEN)["output_ids"] == generate(server, QWEN)["output_ids"]
    for model in (DEEPSEEK, GLM):
        assert take(changing, f"new/{model}")[0] == 200
    assert is_as_at_the_start(changing)
    pools = changing.get("/crosspool/pools")
    assert all(set(pool["mapped_bytes"]) <= {QWEN} for pool in pools)


def test_the_commands_load_and_unload(changing: Server) -> None:
    done = changing.command("load", str(DEMO / GLM), "--name", "glm", "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("glm is asleep")
    assert generate(changing, "glm")
    done = changing.command("load", str(DEMO / GLM), "--name", "glm")
    assert done.returncode == 2 and "another model is named 'glm'" in done.stderr
    done = changing.command("load", str(DEMO))
    assert done.returncode == 2 and "config.json" in done.stderr and "Traceback" not in done.stderr
    done = changing.command("ps", "--json")
    assert [model["name"] for model in json.loads(done.stdout)] == [QWEN, "glm"]
    done = changing.command("unload", "glm", "--timeout", "5")
    assert (done.returncode, done.stdout) == (0, "glm is unloaded\n")
    done = changing.command("unload", "glm")
    assert done.returncode == 2 and "`glm` does not exist" in done.stderr
    assert is_as_at_the_start(changing)


def test_a_pinned_model_is_woken_at_once(changing: Server) -> None:
    assert bring(changing, "glm", GLM, keep="pinned")[0] == 201
    deadline = time.monotonic() + 60
    while told_of(changing)["glm"]["state"] != "resident":
        assert time.monotonic() < deadline, changing.log[-3000:]
        time.sleep(0.1)
    assert take(changing, "glm")[0] == 200
    assert is_as_at_the_start(changing)


def test_what_cannot_be_served_is_refused_and_leaves_everything(
    changing: Server, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(DEMO / GLM, broken)
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    for body, told in (
        ({"path": str(broken)}, "model.safetensors"),
        ({"context_length": 1 << 19}, "context length"),
        ({"kv_ceiling_bytes": "4KiB"}, "kv_ceiling_bytes"),
        ({"kv_floor_bytes": "1GiB"}, "kv_floor_bytes"),
        ({"experts": "demand"}, "expert_pool_bytes: 0"),
    ):
        status, answer = bring(changing, "no", GLM, **body)
        assert status == 400 and told in answer["error"]["message"], answer
    assert is_as_at_the_start(changing)


def test_models_come_and_go_beside_streams_of_another(changing: Server) -> None:
    load = Load(changing, asks([QWEN], 3, new_tokens=60))
    with load.running():
        load.flow()
        for number in range(4):
            model = (DEEPSEEK, GLM)[number % 2]
            assert bring(changing, f"n{number}", model)[0] == 201
            assert generate(changing, f"n{number}")
            assert take(changing, f"n{number}")[0] == 200
        load.answer_all()
    assert not load.problems, load.problems[0]
    assert is_as_at_the_start(changing)


def test_a_device_that_dies_while_a_model_is_loaded_takes_it_all_the_same(
    changing: Server,
) -> None:
    expected = generate(changing, QWEN)["output_ids"]
    meanwhile = 0
    for pause in (0.0, 0.02, 0.05):
        with ThreadPoolExecutor(1) as threads:
            device = changing.find("crosspool::device ")
            loading = threads.submit(bring, changing, "glm", GLM)
            time.sleep(pause)
            meanwhile += not loading.done()
            device.kill()
            psutil.wait_procs([device], timeout=10)
            status, answer = loading.result()
            assert status == 201, answer
        assert generate(changing, "glm")
        assert generate(changing, QWEN)["output_ids"] == expected
        assert take(changing, "glm")[0] == 200
    assert meanwhile, "every load was over before its kill"
    assert is_as_at_the_start(changing)


def test_processes_that_die_later_serve_what_was_loaded(changing: Server) -> None:
    assert bring(changing, "glm", GLM)[0] == 201
    expected = generate(changing, "glm")["output_ids"]
    for title in ("crosspool::device ", "crosspool::detokenizer", "crosspool::scheduler"):
        process = changing.find(title)
        process.kill()
        psutil.wait_procs([process], timeout=10)
        assert generate(changing, "glm")["output_ids"] == expected
    process = changing.find("crosspool::http")
    process.kill()
    psutil.wait_procs([process], timeout=10)
    deadline = time.monotonic() + 60
    while changing.status("/health") != 200:
        assert time.monotonic() < deadline, changing.log[-3000:]
        time.sleep(0.1)
    assert generate(changing, "glm")["output_ids"] == expected
    assert take(changing, "glm")[0] == 200
    assert is_as_at_the_start(changing)


@pytest.mark.parametrize("titles", ["device", "weights device", "scheduler"])
def test_a_model_whose_folder_is_gone_does_not_end_the_others(
    changing: Server, titles: str, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(DEMO / GLM, folder)
    assert bring(changing, "gone", str(folder))[0] == 201
    assert generate(changing, "gone")
    expected = generate(changing, QWEN)["output_ids"]
    shutil.rmtree(folder)
    processes = [changing.find(f"crosspool::{title}") for title in titles.split()]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)
    assert generate(changing, QWEN)["output_ids"] == expected
    deadline = time.monotonic() + 30
    while not is_as_at_the_start(changing):
        assert time.monotonic() < deadline, changing.log[-3000:]
        time.sleep(0.1)
    assert bring(changing, "gone", GLM)[0] == 201 and take(changing, "gone")[0] == 200


def test_where_weights_cannot_be_read_again_no_model_is_loaded(server: Server) -> None:
    """A server that keeps no packed weights."""
    status, answer = bring(server, "no", GLM)
    assert status == 400 and "packed_cache_bytes: 0" in answer["error"]["message"], answer
