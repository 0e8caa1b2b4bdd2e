import dataclasses
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from crosspool.cli.prepare import model_configs, prepare
from crosspool.config import gpu
from crosspool.config.deployment import ConfigError
from crosspool.config.deployment_file import to_options
from crosspool.config.options import Options
from crosspool.config.sizes import exact_size
from crosspool.kernels.cuda_loop import MAX_LINKS
from crosspool.weightpool.placement import initially_resident, rooms
from make_random_checkpoint import make_random_checkpoint
from support.gpus import pretend_gpus
from support.hollow import Change, hollow_weights
from support.server import DEMO

CORES = sorted(os.sched_getaffinity(0))
TOKENIZER = DEMO / "tiny-qwen3-moe" / "tokenizer.json"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 65536,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
# bytes of bf16 KV per token: 2 layers x (K, V) x 2 heads x 16 features
KV_PER_TOKEN = 2 * 2 * 2 * 16 * 2
# 2 layers x (4 experts x 3 matrices of 64 x 32 and the router of 4 x 64) in bf16
FFN_BYTES = 2 * (4 * 3 * 64 * 32 + 4 * 64) * 2
# 2 layers x (q and o of 64 x 64, k and v of 32 x 64, norms), embedding and head, the last norm
ATTENTION_BYTES = (2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 64 + 2 * 16) + 2 * 100 * 64 + 64) * 2


def model(folder: Path, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    shutil.copy(TOKENIZER, folder)
    hollow_weights(folder)
    return str(folder)


def draft(*paths: str, **more: Any) -> Options:
    return to_options({"models": [{"path": path} for path in paths], "port": 0, **more}, "test")


def test_what_is_left_open_is_filled_in(tmp_path: Path) -> None:
    prepared = prepare(draft(model(tmp_path / "a"), model(tmp_path / "b")))
    deployment = prepared.deployment
    assert deployment.names == {0: "a", 1: "b"} and deployment.next_model == 2
    assert [m.path for m in deployment.models.values()] == [str(tmp_path / n) for n in "ab"]
    assert [d.name for d in deployment.devices] == ["cpu"]
    assert deployment.weight_pool_bytes == 2 * FFN_BYTES
    assert 0 < deployment.kv_pool_bytes <= 4 << 30
    assert deployment.kv_pool_bytes < psutil.virtual_memory().total / 4
    assert deployment.port > 0
    assert {n: spec.context for n, spec in prepared.specs.items()} == {0: 65536, 1: 65536}


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    device = f"cpu:{CORES[0]}"
    deployment = prepare(
        draft(
            model(tmp_path / "a"),
            kv_pool_devices=device,
            weight_pool_devices=[device],
            kv_pool_bytes="64MiB",
            weight_pool_bytes="1GB",
            lanes=3,
            chunk_bytes="4MiB",
            sglang={"api_key": "x"},
        )
    ).deployment
    assert [d.name for d in deployment.devices] == [device]
    assert (deployment.kv_pool_bytes, deployment.weight_pool_bytes) == (64 << 20, 10**9)
    assert (deployment.lanes, deployment.chunk_bytes) == (3, 4 << 20)
    assert deployment.sglang == {"api_key": "x"}


def test_the_smallest_pool_for_one_request_is_enough(tmp_path: Path) -> None:
    """A context of 65536 tokens is 16 MiB of KV: 8 chunks."""
    path = model(tmp_path / "a")
    needed = 65536 * KV_PER_TOKEN
    assert prepare(draft(path, kv_pool_bytes=needed)).deployment.kv_pool_bytes == needed
    with pytest.raises(ConfigError) as error:
        prepare(draft(path, kv_pool_bytes=needed - 1))
    said = str(error.value)
    assert f"--kv-pool-bytes {exact_size(needed)}" in said and "a" in said and "65536" in said
    tokens = int(said.partition("--context-length ")[2].partition(",")[0])
    shorter = to_options(
        {
            "models": [{"path": path, "context_length": tokens}],
            "kv_pool_bytes": needed - 1,
            "port": 0,
        },
        "test",
    )
    assert prepare(shorter).specs[0].context == tokens


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores for two devices")
def test_every_kv_device_must_hold_a_request(tmp_path: Path) -> None:
    two = [f"cpu:{CORES[0]}", f"cpu:{CORES[1]}"]
    path, needed = model(tmp_path / "a"), 65536 * KV_PER_TOKEN
    with pytest.raises(ConfigError, match=f"--kv-pool-bytes {exact_size(2 * needed)}"):
        prepare(draft(path, kv_pool_devices=two, kv_pool_bytes=needed))
    assert prepare(draft(path, kv_pool_devices=two, kv_pool_bytes=2 * needed))


def test_weight_pool_of_exactly_what_is_needed(tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    assert prepare(draft(path, weight_pool_bytes=FFN_BYTES))
    with pytest.raises(ConfigError, match="weight_pool_bytes"):
        prepare(draft(path, weight_pool_bytes=FFN_BYTES - 1))


def placed(*places: Any, **more: Any) -> Options:
    """Pinned models of ``FFN_BYTES`` each, with their ``weight_pool_devices``, on two weight
    devices."""
    models = [
        {"path": path, "name": str(index), "weight_pool_devices": own, "keep": "pinned"}
        for index, (path, own) in enumerate(places)
    ]
    pool = [f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"]
    return to_options({"models": models, "weight_pool_devices": pool, "port": 0, **more}, "test")


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores for two devices")
def test_models_on_some_of_the_weight_pools_devices(tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    first, second = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
    places = [(path, second), (path, [second, first]), (path, [second]), (path, None)]
    prepared = prepare(placed(*places))
    deployment = prepared.deployment
    assert [deployment.ffn_ranks(i) for i in range(4)] == [(1,), (0, 1), (1,), (0, 1)]
    assert [d.name for d in deployment.models[1].weight_pool_devices or ()] == [second, first]
    router = 2 * 4 * 64 * 2  # on both ranks of a model that lies on two
    half = (FFN_BYTES - router) // 2 + router
    assert prepared.placement.weight_bytes == (
        {0: 0, 1: half, 2: 0, 3: half},
        {0: FFN_BYTES, 1: half, 2: FFN_BYTES, 3: half},
    )
    fullest = 2 * FFN_BYTES + 2 * half
    assert deployment.weight_pool_bytes == 2 * fullest
    assert prepare(placed(*places, weight_pool_bytes=2 * fullest))
    with pytest.raises(ConfigError, match=f"FFN weights on {second} .*{fullest} bytes"):
        prepare(placed(*places, weight_pool_bytes=2 * fullest - 1))


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores for two devices")
@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ("cpu", f"cpu is none of weight_pool_devices: cpu:{CORES[0]}, cpu:{CORES[-1]}"),
        ([f"cpu:{CORES[0]}"] * 2, f"cpu:{CORES[0]} is named twice"),
        ([], "'' is no device"),
        ("gpu", "'gpu' is no device"),
    ],
)
def test_a_models_devices_must_be_the_weight_pools(tmp_path: Path, own: Any, problem: str) -> None:
    path = model(tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        prepare(placed((path, None), (path, own)))
    assert f"models[1].weight_pool_devices: {problem}" in str(error.value)


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores for two devices")
def test_models_tied_to_devices_of_the_kv_pool(tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    first, second = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
    own: list[Any] = [{"kv_pool_devices": first}, {"kv_pool_devices": [second]}, {}]
    pool = {"kv_pool_devices": [first, second], "weight_pool_devices": [first, second]}
    prepared = prepare(bounded(path, *own, **pool))
    deployment = prepared.deployment
    assert [deployment.attention_ranks(i) for i in range(3)] == [(0,), (1,), (0, 1)]
    held = prepared.placement.attention_bytes[0]
    needed = [
        room.needed
        for room in rooms(deployment, prepared.placement)
        if room.option == "attention_weight_bytes"
    ]
    assert needed == [{0: held, 1: 0, 2: held}, {0: 0, 1: held, 2: held}]
    # Rooms are even shares, and two of the three models lie on each device.
    options = bounded(path, *[{**model, "keep": "pinned"} for model in own], **pool)
    assert prepare(msgspec.structs.replace(options, attention_weight_bytes=4 * held))
    with pytest.raises(ConfigError, match=r"attention_weight_bytes.*with their kv_pool_devices"):
        prepare(msgspec.structs.replace(options, attention_weight_bytes=4 * held - 2))


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ({"kv_pool_devices": "cuda:0"}, "kv_pool_devices: cuda:0 is none of kv_pool_devices: cpu"),
        ({"kv_pool_devices": []}, "kv_pool_devices: '' is no device"),
        (
            {"kv_pool_devices": "cpu", "kv_floor_bytes": "2MiB"},
            "kv_floor_bytes: this is a share of every device",
        ),
        (
            {"kv_pool_devices": "cpu", "kv_ceiling_bytes": "4MiB"},
            "kv_ceiling_bytes: this is a share of every device",
        ),
    ],
)
def test_a_models_devices_of_the_kv_pool_are_checked(
    tmp_path: Path, own: dict[str, Any], problem: str
) -> None:
    path = model(tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        prepare(bounded(path, {}, own))
    assert f"models[1].{problem}" in str(error.value)


def test_gpus_of_the_kv_pool_serve_every_model(tmp_path: Path) -> None:
    path, gpu = model(tmp_path / "a"), {"kv_pool_devices": "cuda:0"}
    with pytest.raises(ConfigError, match=r"models\[0\].kv_pool_devices: cuda:0: every GPU"):
        model_configs(bounded(path, gpu, **gpu, weight_pool_devices="cuda:0"))


def bounded(path: str, *bounds: dict[str, Any], **more: Any) -> Options:
    """One model of ``path`` for each of ``bounds``."""
    models = [{"path": path, "name": f"m{i}", **own} for i, own in enumerate(bounds)]
    return to_options({"models": models, "port": 0, **more}, "test")


def test_floors_and_ceilings_are_read(tmp_path: Path) -> None:
    path = model(tmp_path / "a", max_position_embeddings=1024)
    models = prepare(
        bounded(path, {"kv_floor_bytes": "4MiB", "kv_ceiling_bytes": 8 << 20}, {})
    ).deployment.models
    assert [(m.kv_floor_bytes, m.kv_ceiling_bytes) for m in models.values()] == [
        (4 << 20, 8 << 20),
        (0, None),
    ]


# one request of 65536 tokens takes 16 MiB, on each KV device
@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        (
            ({"kv_floor_bytes": "20MiB"}, {"kv_floor_bytes": "13MiB"}),
            "kv_floor_bytes: the floors of all models come to 34.0 MiB in whole chunks, more than "
            "the KV pool's 32.0 MiB",
        ),
        (
            ({"kv_floor_bytes": "20MiB", "kv_ceiling_bytes": "18MiB"},),
            "kv_ceiling_bytes of m0: 18MiB is below its kv_floor_bytes, 20MiB",
        ),
        (
            ({"kv_ceiling_bytes": "15MiB"},),
            "kv_ceiling_bytes of m0: 15.0 MiB on 1 device(s) do not hold one request of 65536 "
            "tokens, the context of m0: give --context-length 57344, or a ceiling of 16MiB",
        ),
        (
            ({}, {"kv_floor_bytes": "17MiB"}),
            "kv_pool_bytes: 32.0 MiB on 1 device(s) beside the floors of other models, 18.0 MiB, "
            "do not hold one request of 65536 tokens, the context of m0: give --context-length "
            "57344, or --kv-pool-bytes 34MiB",
        ),
        (({"kv_floor_bytes": "much"},), "models[0].kv_floor_bytes: 'much' is no size"),
    ],
)
def test_floors_and_ceilings_that_cannot_be_kept(
    tmp_path: Path, bounds: tuple[dict[str, Any], ...], problem: str
) -> None:
    path = model(tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        prepare(bounded(path, *bounds, kv_pool_bytes="32MiB"))
    assert problem in str(error.value)


def test_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .*--port"):
            prepare(draft(model(tmp_path / "a"), port=port))


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("lanes", 0, "lanes: 0 must be between 1 and 256"),
        ("page_size", 0, "page_size: 0 must be between 1 and 65536"),
        ("growth_tokens", 0, "growth_tokens: 0 must be between 1 and 2147483648"),
        ("lanes", 10**8, "lanes: 100000000 must be between 1 and 256"),
        ("random_seed", 2**64, "random_seed: 18446744073709551616 must be between -9"),
        ("chunked_prefill_size", 2**40, "must be between 1 and 1048576"),
        ("max_running_requests", 10**30, "must be between 1 and 65536"),
        ("max_queued_requests", 10**30, "must be between 0 and 2147483648"),
        ("lease_steps", 10**30, "must be between 1 and 65536"),
        ("port", 70000, "port: 70000 must be between"),
        ("kv_pool_bytes", "2 gigs", "kv_pool_bytes: '2 gigs' is no size"),
        ("weight_pool_bytes", "x", "weight_pool_bytes: 'x' is no size"),
        ("chunk_bytes", "3MiB", "chunk_bytes: 3MiB must be a multiple of 2MiB"),
        ("kv_pool_devices", "gpu", "kv_pool_devices: 'gpu' is no device"),
        ("kv_pool_devices", "cpu:99999", r"kv_pool_devices: cpu:99999: cores \[99999\] are not"),
        ("kv_pool_devices", "node1/cpu", "kv_pool_devices: node1/cpu is on node 1, and there is"),
        ("node_rank", 1, "node_rank: 1 must be less than nnodes, 1"),
        ("nnodes", 2, "dist_init_addr is missing: nnodes is 2"),
        ("weight_pool_devices", "cpu,cpu", "weight_pool_devices: cpu is named twice"),
        ("kv_pool_bytes", "900TiB", "of memory are available"),
        (
            "chunked_prefill_size",
            40,
            "chunked_prefill_size: 40 must be a multiple of page_size, 16: give 32 or 48,",
        ),
        ("chunked_prefill_size", 8, "8 must be a multiple of page_size, 16: give 16,"),
        ("page_size", 24, "512 must be a multiple of page_size, 24: give 504 or 528,"),
        ("host", "no.such.host.invalid", "port 0 on no.such.host.invalid"),
    ],
)
def test_mistakes_name_the_field(tmp_path: Path, field: str, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        prepare(draft(model(tmp_path / "a"), **{field: value}))


LAST = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda ref: None if ref.name == LAST else ref, f"b: the checkpoint has no tensor {LAST}"),
        (
            lambda ref: dataclasses.replace(ref, shape=(9, 9)) if ref.name == LAST else ref,
            rf"tensor {LAST} has shape \[9, 9\]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_told_before_anything_starts(
    tmp_path: Path, change: Change, problem: str
) -> None:
    first, second = model(tmp_path / "a"), model(tmp_path / "b")
    hollow_weights(tmp_path / "b", change)
    with pytest.raises(ConfigError, match=problem):
        prepare(draft(first, second))


def test_quantised_weights_take_the_bytes_of_their_codes(tmp_path: Path) -> None:
    """Codes of 4 bits, and a scale and a zero point in float16 for each group of 32; the router is
    not quantised."""
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path = model(tmp_path / "a", quantization_config=gptq)
    held = 2 * (4 * 3 * (64 * 32 // 2 + 64 * 32 // 32 * 4) + 4 * 64 * 2)
    resident = prepare(draft(path)).placement.weight_bytes
    host = prepare(draft(path, loop="host")).placement.weight_bytes
    assert [sum(of.values()) for of in host] == [FFN_BYTES]
    assert [sum(of.values()) for of in resident] == [held]


def test_floats_that_are_rounded_take_the_bytes_of_their_codes(tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    models = [{"path": path, "quantization": "int4"}]
    prepared = prepare(to_options({"models": models, "port": 0}, "test"))
    held = 2 * (4 * 3 * (64 * 32 // 2 + 64 * 32 // 32 * 4) + 4 * 64 * 2)
    assert [sum(of.values()) for of in prepared.placement.weight_bytes] == [held]


def test_what_is_quantised_already_is_not_rounded(tmp_path: Path) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path = model(tmp_path / "a", quantization_config=gptq)
    models = [{"path": path, "quantization": "int4"}]
    with pytest.raises(ConfigError, match="quantization='int4': the checkpoint is quantised"):
        prepare(to_options({"models": models, "port": 0}, "test"))


def test_float16_weights_under_bfloat16_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = model(tmp_path / "a")
    prepare(draft(path))
    assert caplog.text == ""
    hollow_weights(tmp_path / "a", dtype="F16")
    prepare(to_options({"models": [{"path": path, "dtype": "float32"}], "port": 0}, "test"))
    assert caplog.text == ""
    prepare(draft(path))
    (record,) = caplog.records
    assert re.match(
        r"a: (\d+) of \1 tensors are float16, such as model\.\S+, and lose 3 bits .* as bfloat16: "
        "serve them with --dtype float32",
        record.getMessage(),
    )


def test_preparing_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from crosspool.cli.prepare import prepare;"
        "from crosspool.config.deployment_file import to_options;"
        "prepare(to_options({'models': [{'path': sys.argv[1]}], 'port': 0}, 'test'));"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, model(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_models_must_exist_and_have_names_of_their_own(tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub").mkdir()
    for paths, problem in (
        ([], "name at least one"),
        ([str(tmp_path / "nowhere")], "nowhere: no such folder"),
        ([str(tmp_path / "empty")], r"empty: there is no config\.json"),
        ([path, path], "two models are named 'a'"),
        ([path] * 257, "there are 257, and at most 256"),
        ([path, model(tmp_path / "sub" / "a")], "two models are named 'a'"),
        ([model(tmp_path / "x y")], "model name 'x y'"),
        ([model(tmp_path / "x:y")], "model name 'x:y'"),  # SGLang has adapters after a colon
    ):
        with pytest.raises(ConfigError, match=problem):
            prepare(draft(*paths))


def test_a_gpu_for_both_pools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpus(monkeypatch, tmp_path, 1000)
    both: dict[str, Any] = {"kv_pool_devices": "cuda:0", "weight_pool_devices": "cuda:0"}
    path = model(tmp_path / "a")
    deployment = prepare(draft(path, **both)).deployment
    assert [device.name for device in deployment.devices] == ["cuda:0"]
    assert deployment.weight_pool_bytes == FFN_BYTES
    # What weights leave of 92 % of its free memory, in whole chunks.
    usable = int((1000 << 20) * 0.92)
    assert usable - (4 << 20) < deployment.kv_pool_bytes < usable
    assert deployment.kv_pool_bytes % (2 << 20) == 0
    with pytest.raises(ConfigError, match="of memory of cuda:0 are available"):
        prepare(draft(path, kv_pool_bytes=usable, **both))


def test_what_gpus_do_not_compute_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_gpus(monkeypatch, tmp_path, 1000)
    both: dict[str, Any] = {"kv_pool_devices": "cuda:0", "weight_pool_devices": "cuda:0"}
    path = str(make_random_checkpoint("gpt_oss", tmp_path / "oss", {"vocab_size": 160}))
    with pytest.raises(ConfigError) as caught:
        prepare(draft(model(tmp_path / "a"), path, **both))
    for text in (
        "oss: model_type='gpt_oss' is served on CPUs alone",
        "attention sinks, sliding windows",
        "clamped SwiGLU, biases of experts",
        "name CPUs in kv_pool_devices",
    ):
        assert text in str(caught.value)


def test_old_gpus_are_driven_by_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One old GPU decides for all devices of the deployment."""
    path, gpus = model(tmp_path / "a"), tmp_path / "gpus"
    gpus.mkdir()
    places: dict[str, Any] = {"kv_pool_devices": "cuda:0", "weight_pool_devices": "cuda:1"}
    pretend_gpus(monkeypatch, gpus, 1000, 1000)
    with caplog.at_level(logging.INFO):
        assert prepare(draft(path, **places)).deployment.loop == "resident"
    assert caplog.text == ""
    pretend_gpus(monkeypatch, gpus, 1000, 1000, compute=("10.0", "8.6"))
    assert prepare(draft(path, loop="host", **places)).deployment.loop == "host"
    with pytest.raises(ConfigError, match=r"gpu_links: nvshmem needs .* 9\.0 .*cuda:1 .*8\.6\)"):
        prepare(draft(path, gpu_links="nvshmem", **places))
    assert caplog.text == ""
    assert prepare(draft(path, **places)).deployment.loop == "host"
    (record,) = caplog.records
    assert "9.0 or newer, unlike cuda:1 (Pretended H100, compute capability 8.6)" in (
        record.getMessage()
    )


def test_float8_kv_is_refused_on_gpus_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_gpus(monkeypatch, tmp_path, 1000)
    models = [
        {"path": model(tmp_path / "a"), "kv_cache_dtype": "fp8_e5m2"},
        {"path": model(tmp_path / "b"), "kv_cache_dtype": "auto"},
    ]
    places = {"kv_pool_devices": "cuda:0", "weight_pool_devices": "cuda:0", "port": 0}
    with pytest.raises(ConfigError, match=r"^kv_cache_dtype: fp8_e5m2, which a is given, .*cuda:0"):
        prepare(to_options({"models": models, **places}, "test"))
    prepared = prepare(to_options({"models": models[1:], **places}, "test"))
    assert prepared.specs[0].kv_dtype == "bfloat16"


@pytest.mark.parametrize("loop", ["host", "resident"])
def test_float8_kv_takes_a_byte_per_element(tmp_path: Path, loop: str) -> None:
    path = model(tmp_path / "a")
    kinds = ("auto", "fp8_e4m3", "fp8_e5m2")
    models = [{"path": path, "name": kind, "kv_cache_dtype": kind} for kind in kinds]
    plain, *rounded = prepare(
        to_options({"models": models, "port": 0, "loop": loop}, "test")
    ).specs.values()
    assert (plain.kv_dtype, plain.kv_bytes_per_token) == ("bfloat16", KV_PER_TOKEN)
    assert [spec.kv_dtype for spec in rounded] == ["fp8_e4m3", "fp8_e5m2"]
    assert all(2 * spec.kv_bytes_per_token == KV_PER_TOKEN for spec in rounded)


@pytest.mark.parametrize(("kv", "lanes"), [("cuda:0", 30), ("cuda:0,cuda:1", 26)])
def test_lanes_need_connections(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kv: str, lanes: int
) -> None:
    """A GPU has 32 connections: two for other streams, one for every eight links that it serves."""
    pretend_gpus(monkeypatch, tmp_path, 1000, 1000)
    path = model(tmp_path / "a")
    most: dict[str, Any] = {"kv_pool_devices": kv, "weight_pool_devices": kv}
    assert prepare(draft(path, lanes=lanes, **most)).deployment.lanes == lanes
    prepare(draft(path, lanes=lanes + 1, loop="host", **most))
    with pytest.raises(ConfigError, match=rf"^lanes: {lanes + 1} lanes .* 33 streams on cuda:0,"):
        prepare(draft(path, lanes=lanes + 1, **most))
    assert gpu._LINKS_OF_A_LANE == MAX_LINKS


def test_gpus_serve_beside_gpus_but_not_beside_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_gpus(monkeypatch, tmp_path, 1000, 600)
    path = model(tmp_path / "a")
    apart = prepare(draft(path, kv_pool_devices="cuda:1", weight_pool_devices="cuda:0"))
    assert [device.name for device in apart.deployment.devices] == ["cuda:1", "cuda:0"]
    # The KV pool takes what its own GPU has left.
    usable = int((600 << 20) * 0.92)
    assert usable - (4 << 20) < apart.deployment.kv_pool_bytes < usable
    both = prepare(draft(path, kv_pool_devices="cuda:0,cuda:1", weight_pool_devices="cuda:1"))
    assert both.deployment.kv_pool_bytes <= 2 * usable
    for kv, weights in (("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1,cpu")):
        with pytest.raises(ConfigError, match=r"cuda:0.*cpu: a CPU cannot serve beside a GPU"):
            prepare(draft(path, kv_pool_devices=kv, weight_pool_devices=weights))
    with pytest.raises(ConfigError, match="gpu_links: nvshmem needs the resident loop"):
        prepare(draft(path, gpu_links="nvshmem", loop="host"))
    with pytest.raises(ConfigError, match="cuda:2: 2 GPU"):
        prepare(draft(path, kv_pool_devices="cuda:2", weight_pool_devices="cuda:2"))


def test_a_grammar_backend_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = draft(model(tmp_path / "a"), sglang={"grammar_backend": "llguidance"})
    monkeypatch.setattr("crosspool.cli.prepare.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"grammar_backend.*pip install 'crosspool\[llguidance\]'"
    ):
        prepare(options)
    monkeypatch.setattr("crosspool.cli.prepare.find_spec", lambda name: object())
    assert prepare(options).deployment.sglang["grammar_backend"] == "llguidance"


def sleepers(path: str, *, models: list[dict[str, Any]], **more: Any) -> Options:
    named = [{"path": path, "name": f"m{i}", **one} for i, one in enumerate(models)]
    return to_options({"models": named, "port": 0, **more}, "test")


def test_models_that_do_not_all_fit_take_turns(tmp_path: Path) -> None:
    path, cache = model(tmp_path / "a"), str(tmp_path / "cache")
    given = sleepers(
        path,
        models=[{}] * 3,
        weight_pool_bytes=2 * FFN_BYTES,
        packed_cache_dir=cache,
    )
    prepared = prepare(given)
    assert prepared.deployment.weight_pool_bytes == 2 * FFN_BYTES
    assert initially_resident(prepared.deployment, prepared.specs) == {0, 1}


@pytest.mark.parametrize(
    ("models", "more", "said"),
    [
        ([{}, {}], {"weight_pool_bytes": FFN_BYTES}, "weight_pool_bytes"),
        ([{}, {}], {"attention_weight_bytes": ATTENTION_BYTES}, "attention_weight_bytes"),
        ([{"keep": "asleep"}], {}, "keep: m0"),
        ([{}, {"ttl": 5}], {}, "ttl: m1"),
    ],
)
def test_models_that_must_sleep_need_the_packed_cache(
    tmp_path: Path, models: list[dict[str, Any]], more: dict[str, Any], said: str
) -> None:
    """Under the host loop they do not, since it reads checkpoints."""
    path, cache = model(tmp_path / "a"), str(tmp_path / "cache")
    with pytest.raises(ConfigError) as error:
        prepare(sleepers(path, models=models, packed_cache_bytes=0, **more))
    assert said in str(error.value) and "packed_cache_bytes: 0" in str(error.value)
    prepare(sleepers(path, models=models, packed_cache_bytes=0, loop="host", **more))
    every = len(models) * (FFN_BYTES + ATTENTION_BYTES)
    with pytest.raises(ConfigError, match=f"packed_cache_bytes.*at least {exact_size(every)}"):
        prepare(sleepers(path, models=models, packed_cache_bytes=every - 1, **more))
    prepare(sleepers(path, models=models, packed_cache_bytes=every, packed_cache_dir=cache, **more))
    Path(cache).chmod(0o777)
    with pytest.raises(ConfigError, match=r"packed_cache_dir: .* others may write to it"):
        prepare(sleepers(path, models=models, packed_cache_dir=cache, **more))


def test_no_model_sleeps_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, tmp_path, 40_000)
    path = model(tmp_path / "a")
    gpu_pools = {"kv_pool_devices": "cuda:0", "weight_pool_devices": ["cuda:0"]}
    prepare(sleepers(path, models=[{}, {}], **gpu_pools))
    with pytest.raises(
        ConfigError, match=r"weight_pool_bytes.*so that some of them must sleep.*GPU"
    ):
        prepare(sleepers(path, models=[{}, {}], weight_pool_bytes=FFN_BYTES, **gpu_pools))


# 2 layers x 4 experts x 3 matrices of 64 x 32 in bf16
EXPERT_BYTES = 2 * 4 * 3 * 64 * 32 * 2
MIB = 1 << 20


def on_demand(folder: Path, *experts: str, **more: Any) -> Options:
    """Asks for as many models as ``experts``, each with its routed experts as they say."""
    models = [
        {"path": model(folder / f"m{i}"), "experts": which} for i, which in enumerate(experts)
    ]
    cache = {"packed_cache_dir": str(folder / "cache")}
    return to_options({"models": models, "port": 0, **cache, **more}, "test")


def test_the_expert_pool_is_what_other_weights_leave(tmp_path: Path) -> None:
    prepared = prepare(on_demand(tmp_path, "demand"))
    rest = FFN_BYTES - EXPERT_BYTES
    assert prepared.placement.weight_bytes == ({0: rest},)
    assert prepared.placement.expert_bytes == ({0: EXPERT_BYTES},)
    assert prepared.deployment.expert_pool_bytes == 2 * MIB
    assert prepared.deployment.weight_pool_bytes == 2 * MIB + rest

    prepared = prepare(on_demand(tmp_path, "demand", "all", weight_pool_bytes="5MiB"))
    assert prepared.placement.weight_bytes == ({0: rest, 1: FFN_BYTES},)
    assert prepared.placement.expert_bytes == ({0: EXPERT_BYTES, 1: 0},)
    assert prepared.deployment.expert_pool_bytes == 4 * MIB

    given = {"weight_pool_bytes": 2 * MIB + FFN_BYTES, "expert_pool_bytes": "2MiB"}
    prepared = prepare(on_demand(tmp_path, "demand", "all", **given))
    assert prepared.deployment.expert_pool_bytes == 2 * MIB
    resident = initially_resident(prepared.deployment, prepared.specs)
    assert resident == {0}, "what is set aside for experts is no room for whole models"

    assert prepare(on_demand(tmp_path, "all")).deployment.expert_pool_bytes == 0
    prepared = prepare(on_demand(tmp_path, "all", expert_pool_bytes="2MiB"))
    assert prepared.deployment.expert_pool_bytes == 2 * MIB, "for models to come"
    assert prepared.deployment.weight_pool_bytes == 2 * MIB + FFN_BYTES


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"weight_pool_bytes": "1MiB"}, "expert_pool_bytes: 0 on 1 .* at least 2MiB"),
        ({"expert_pool_bytes": "1MiB"}, "expert_pool_bytes: 1MiB .* one layer of m0"),
        (
            {"weight_pool_bytes": "4MiB", "expert_pool_bytes": "6MiB"},
            "expert_pool_bytes: 6MiB are more than weight_pool_bytes, 4MiB",
        ),
        (
            {"weight_pool_bytes": "2MiB", "expert_pool_bytes": "2MiB"},
            "weight_pool_bytes is too small: .* beside its share of expert_pool_bytes",
        ),
        ({"loop": "host"}, "experts: those of m0 .* the resident loop alone"),
        ({"packed_cache_bytes": 0}, "experts: those of m0 .* packed_cache_bytes: 0"),
    ],
)
def test_experts_on_demand_that_cannot_be_are_refused(
    tmp_path: Path, more: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        prepare(on_demand(tmp_path, "demand", **more))


def test_a_router_is_told_where_the_server_is(tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    alone = prepare(draft(path)).deployment
    assert (alone.router_url, alone.advertise_url) == (None, None)
    made = prepare(draft(path, router_url="http://10.0.0.9:30080/")).deployment
    assert made.router_url == "http://10.0.0.9:30080"
    assert made.advertise_url == f"http://127.0.0.1:{made.port}"
    six = prepare(draft(path, router_url="http://[::1]:1", host="::1")).deployment
    assert (six.router_url, six.advertise_url) == ("http://[::1]:1", f"http://[::1]:{six.port}")
    given = {"router_url": "https://r", "host": "0.0.0.0", "advertise_url": "http://node-1:80/x/"}
    assert prepare(draft(path, **given)).deployment.advertise_url == "http://node-1:80/x"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"router_url": "10.0.0.9:30080"}, "router_url: '10.0.0.9:30080' is no URL"),
        ({"router_url": "http://u:canary@r"}, "router_url: a URL with a user or a password"),
        ({"router_url": "http://r:99999"}, "router_url: 'http://r:99999' is no URL"),
        ({"router_url": "http://r", "advertise_url": "node"}, "advertise_url: 'node' is no URL"),
        ({"router_url": "http://r", "host": "0.0.0.0"}, "give --advertise-url"),
        ({"router_url": "http://r", "router_api_key": "canary\n"}, "router_api_key: it must"),
        ({"router_api_key": "canary"}, "router_api_key: .* give router_url, too"),
        ({"advertise_url": "http://node"}, "advertise_url: .* give router_url, too"),
    ],
)
def test_a_router_that_cannot_be_told_is_a_mistake(
    tmp_path: Path, given: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        prepare(draft(model(tmp_path / "a"), **given))
    assert "canary" not in str(error.value)
