import os

import pytest
from crosspool.config.deployment import ConfigError
from crosspool.config.device import Device
from crosspool.config.flags import parse
from crosspool.config.sglang_flags import FLAGS, HIDDEN, without_secrets

CORE = Device(f"cpu:{min(os.sched_getaffinity(0))}")
TWO = ["--model-path", "/models/a", "--model-path", "/models/b"]
CANARY = "canary-97531"


def test_flags_of_sglang_and_of_the_pools() -> None:
    draft = parse(
        [
            *TWO,
            *["--served-model-name", "A", "--served-model-name", "B"],
            *["--context-length", "512", "--context-length", "1024"],
            *["--dtype", "float32", "--kv-pool-devices", CORE.name, "--kv-pool-bytes", "2GiB"],
            *["--lanes", "3", "--port", "1234", "--api-key", "secret", "--enable-metrics"],
            *["--chat-template", "chatml", "--trust-remote-code", "--log-requests-target", "a"],
        ]
    )
    assert [(m.path, m.name) for m in draft.models] == [("/models/a", "A"), ("/models/b", "B")]
    assert [m.context_length for m in draft.models] == [512, 1024]
    assert {m.dtype for m in draft.models} == {"float32"}
    assert draft.models[0].sglang == {"chat_template": "chatml", "trust_remote_code": True}
    assert draft.models[1].sglang == draft.models[0].sglang
    assert draft.sglang == {
        "api_key": "secret",
        "enable_metrics": True,
        "log_requests_target": ["a"],
    }
    assert (draft.kv_pool_devices, draft.kv_pool_bytes) == ((CORE,), 2 << 30)
    assert (draft.lanes, draft.port) == (3, 1234)


def test_what_is_not_given_is_left_open() -> None:
    draft = parse(["--model", "/models/a"])
    (model,) = draft.models
    assert (model.name, model.context_length, model.dtype, model.sglang) == (None, None, "auto", {})
    assert draft.kv_pool_bytes is None and draft.weight_pool_bytes is None
    assert draft.sglang == {}


def test_json_flags_arrive_parsed() -> None:
    flag = next(flag.flag for flag in FLAGS if flag.plain_type is dict and flag.per_model)
    draft = parse([*TWO, flag, '{"x": 1}', flag, "{}"])
    assert [list(m.sglang.values()) for m in draft.models] == [[{"x": 1}], [{}]]
    with pytest.raises(ConfigError, match=f"{flag}: .* is no JSON"):
        parse([*TWO, flag, "{x"])


def test_the_prefix_cache_is_switched_off_by_sglangs_flag() -> None:
    assert parse(["--model-path", "a"]).prefix_cache
    assert not parse(["--model-path", "a", "--disable-radix-cache"]).prefix_cache


def test_the_packed_cache_is_switched_off_by_a_bound_of_0() -> None:
    given = parse([*TWO, "--packed-cache-dir", "/cache", "--packed-cache-bytes", "0"])
    assert (given.packed_cache_dir, given.packed_cache_bytes) == ("/cache", 0)
    assert parse(TWO).packed_cache_bytes == 64 << 30


def test_flags_of_promises() -> None:
    draft = parse(
        [*TWO, "--kv-floor-bytes", "1MiB", "--promise", "growth", "--growth-tokens", "64"]
    )
    assert [m.kv_floor_bytes for m in draft.models] == [1 << 20] * 2
    assert [m.kv_ceiling_bytes for m in draft.models] == [None] * 2
    assert (draft.promise, draft.growth_tokens) == ("growth", 64)
    with pytest.raises(ConfigError, match="promise"):
        parse([*TWO, "--promise", "nothing"])


def test_flags_without_effect_are_taken_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    draft = parse(["--model-path", "a", "--mem-fraction-static", "0.8", "--max-total-tokens", "9"])
    assert draft == parse(["--model-path", "a"])
    said = capsys.readouterr().err
    assert "--mem-fraction-static has no effect" in said
    assert "--max-total-tokens has no effect" in said


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--model-path is missing"),
        ([*TWO, "--served-model-name", "A"], "--served-model-name is given 1 times for 2 models"),
        ([*TWO, *["--context-length", "5"] * 3], "--context-length is given 3 times for 2 models"),
        ([*TWO, "--tp-size", "2"], "--tp-size: parallelism follows"),
        ([*TWO, "--tp=2"], "--tp: parallelism follows"),
        ([*TWO, "--json-model-override-args", "{}"], "--json-model-override-args: ranks read"),
        ([*TWO, "--nonsense"], "--nonsense: CrossPool has no such argument"),
        ([*TWO, "word"], "'word'"),
        ([*TWO, "--lanes", "two"], "--lanes: invalid int value: 'two'"),
        ([*TWO, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ([*TWO, "--ffn-parallel", "pp"], "--ffn-parallel: invalid choice: 'pp'"),
        ([*TWO, "--port"], "--port: expected one argument"),
        ([*TWO, "--lanes", "0"], "--lanes: 0 must be between 1 and 256"),
        ([*TWO, "--stream-interval", "0"], "--stream-interval: 0 must be at least 1"),
        ([*TWO, "--batch-notify-size", "0"], "--batch-notify-size: 0 must be at least 1"),
        ([*TWO, "--kv-floor-bytes", "much"], "--kv-floor-bytes: 'much' is no size: write 2GiB"),
        ([*TWO, "--chunk-bytes", "3MiB"], "--chunk-bytes: 3MiB must be a multiple of 2MiB"),
        ([*TWO, "--weight-pool-devices", "gpu"], "--weight-pool-devices: 'gpu' is no device"),
    ],
)
def test_mistakes_name_the_flag(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(flags)


@pytest.mark.parametrize("name", ["--admin-key", "--ssl-keyfile-password", "--api_key"])
@pytest.mark.parametrize("equals", [True, False])
def test_what_may_be_a_key_is_not_told(name: str, equals: bool) -> None:
    words = [f"{name}={CANARY}"] if equals else [name, CANARY]
    with pytest.raises(ConfigError, match=f"^{name}: ") as error:
        parse([*TWO, *words])
    assert CANARY not in str(error.value)


def test_sglang_sees_that_keys_are_set_and_no_key() -> None:
    given = {"api_key": CANARY, "admin_api_key": "", "log_level": "info"}
    assert without_secrets(given) == {**given, "api_key": HIDDEN}


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--kv-pool-bytes" in said and "python -m crosspool.launch_server" in said
    assert all(flag.flag in said for flag in FLAGS)
