import os
from pathlib import Path

import pytest
from crosspool.config.deployment import ConfigError
from crosspool.config.deployment_file import read
from crosspool.config.device import Device
from crosspool.config.example import example
from crosspool.config.options import SERVER_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
LAST = f"cpu:{max(os.sched_getaffinity(0))}"


def write(folder: Path, text: str) -> Path:
    file = folder / "deployment.yaml"
    file.write_text(text)
    return file


def test_the_example_is_read() -> None:
    draft = read(ROOT / "deployment.example.yaml")
    assert [model.name for model in draft.models] == ["qwen", "deepseek"]
    assert draft.models[1].dtype == "float32"
    assert draft.models[0].path == str(ROOT / "python/crosspool/demo/tiny-qwen3-moe")
    assert draft.kv_pool_bytes == 256 << 20


def test_the_example_is_what_the_options_make_of_it() -> None:
    assert (ROOT / "deployment.example.yaml").read_text() == example(), (
        "python -m crosspool.config.example > deployment.example.yaml"
    )
    options = read(ROOT / "deployment.example.yaml")
    for name, option in SERVER_OPTIONS.items():
        if option.example is None:
            assert getattr(options, name) == option.default


def test_devices_of_a_model(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        f"models: [{{path: a, weight_pool_devices: '{LAST}'}}, {{path: b}}, "
        f"{{path: c, weight_pool_devices: ['cpu', '{LAST}']}}]",
    )
    own = [model.weight_pool_devices for model in read(file).models]
    assert own == [(Device(LAST),), None, (Device("cpu"), Device(LAST))]


def test_devices_of_the_kv_pool_that_serve_a_model(tmp_path: Path) -> None:
    file = write(
        tmp_path, f"models: [{{path: a, kv_pool_devices: ['cpu', '{LAST}']}}, {{path: b}}]"
    )
    own = [model.kv_pool_devices for model in read(file).models]
    assert own == [(Device("cpu"), Device(LAST)), None]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "models: [{path: a}, {path: /b}, {path: ~/c}]")
    paths = [model.path for model in read(file).models]
    assert paths == [str(tmp_path / "a"), "/b", str(Path.home() / "c")]
    assert read(file).packed_cache_dir is None
    file = write(tmp_path, "models: [{path: a}]\npacked_cache_dir: cache")
    assert read(file).packed_cache_dir == str(tmp_path / "cache")


def test_only_sizes_that_may_be_zero_may_be_zero(tmp_path: Path) -> None:
    for zero in ("0", "'0'"):
        file = write(tmp_path, f"models: [{{path: a}}]\npacked_cache_bytes: {zero}")
        assert read(file).packed_cache_bytes == 0
    file = write(tmp_path, "models: [{path: a}]\npacked_cache_bytes: 3GiB")
    assert read(file).packed_cache_bytes == 3 << 30
    file = write(tmp_path, "models: [{path: a}]\nkv_pool_bytes: 0")
    with pytest.raises(ConfigError, match="kv_pool_bytes: 0 is no size"):
        read(file)


def test_what_a_model_says_of_its_residency(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "models: [{path: a, keep: pinned, priority: -2}, {path: b, keep: asleep, ttl: 0}, "
        "{path: c}]\nattention_weight_bytes: 1GiB\nresidency_quantum: 2.5",
    )
    options = read(file)
    assert [(m.keep, m.ttl, m.priority) for m in options.models] == [
        ("pinned", None, -2),
        ("asleep", 0, 0),
        ("demand", None, 0),
    ]
    assert (options.attention_weight_bytes, options.residency_quantum) == (1 << 30, 2.5)
    assert read(write(tmp_path, MODEL)).attention_weight_bytes is None


MODEL = "models: [{path: a}]\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "models is missing"),
        ("", "top level: Expected `object`, got `null`"),
        ("models: [", "is no YAML"),
        ("models: [{name: a}]", r"models\[0\].path is missing"),
        ("models: [{path: a, keep: never}]", "'never' is not one of pinned, demand, asleep"),
        ("models: [{path: a, ttl: -1}]", r"models\[0\].ttl: -1 must be at least 0"),
        (MODEL + "residency_quantum: .inf", "residency_quantum: inf must be between 0.1 and 86400"),
        ("models: [{path: a, nam: b}]", r"unknown key models\[0\].nam \(did you mean name\?\)"),
        (MODEL + "kv_pool_byte: 1GiB", r"unknown key kv_pool_byte \(did you mean kv_pool_bytes\?"),
        (MODEL + "zzz: 1", r"unknown key zzz \(known keys: models, .*lanes"),
        (
            "models: [{path: a, weight_pool_devices: 1}]",
            r"models\[0\].weight_pool_devices: Expected",
        ),
        (MODEL + "lanes: two", "lanes: Expected `int`, got `str`"),
        (MODEL + "lanes: 1.5", "lanes: Expected `int`, got `float`"),
        ("models: {path: a}", "models: Expected `array`, got `object`"),
        (MODEL + "ffn_parallel: pp", "ffn_parallel: 'pp' is not one of tp, ep"),
        (MODEL + "lanes: 0", "lanes: 0 must be between 1 and 256"),
        (MODEL + "tbt_target_ms: .nan", "tbt_target_ms: nan must be at least 0"),
        (MODEL + "sglang: {api_kee: x}", r"sglang.api_kee: did you mean api_key\?"),
        (MODEL + "sglang: {tp_size: 2}", "sglang.tp_size: parallelism follows"),
        (MODEL + "sglang: {port: 2}", "sglang.port: write this key outside of sglang"),
        (
            MODEL + "sglang: {disable_radix_cache: true}",
            "sglang.disable_radix_cache: write prefix_cache: false outside of sglang",
        ),
        (MODEL + "sglang: {mem_fraction_static: 0.5}", "sglang.mem_fraction_static has no effect"),
        (MODEL + "sglang: {api_key: 5}", "sglang.api_key: Expected `str`, got `int`$"),
        (MODEL + "sglang: {grammar_backend: x}", "grammar_backend: 'x' is not one of xgrammar"),
        (
            "models: [{path: a, sglang: {json_model_override_args: '{}'}}]",
            r"models\[0\].sglang.json_model_override_args: ranks read the model's own config.json",
        ),
        (
            "models: [{path: a, sglang: {api_key: x}}]",
            r"models\[0\].sglang.api_key is the whole server's",
        ),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, problem: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=problem) as error:
        read(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "value", ["97531", "[97531]", "{97531: 1}", "'97531", "97531: x", '"97531\\z"']
)
def test_a_mistake_in_a_key_does_not_tell_it(tmp_path: Path, value: str) -> None:
    file = write(tmp_path, f"{MODEL}sglang:\n  api_key: {value}\n")
    with pytest.raises(ConfigError) as error:
        read(file)
    assert str(file) in str(error.value) and "97531" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        read(tmp_path / "nowhere.yaml")
