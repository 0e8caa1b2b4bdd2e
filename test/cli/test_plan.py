"""``crosspool plan`` as a user calls it: what it prints, what it writes, what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import crosspool
import msgspec
import pytest
from crosspool.cli.main import main
from crosspool.cli.prepare import prepare
from crosspool.config.deployment_file import read
from crosspool.config.device import Device
from crosspool.planner.shapes import catalogue
from support.server import free_port

DEMO = Path(crosspool.__file__).parent / "demo"
TINY = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
PAPER = ("Qwen3-30B-A3B", "GLM-4.7-Flash", "DeepSeek-V2-Lite")
FIVE = ("--devices", "5x40GB")
RATE = ("--rate", "1.5", "--prompt", "mean=800,sigma=1", "--output", "200", "--tbt-ms", "60")
QUICK = ("--samples", "5000")


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        status = main(["plan", *words])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    status, out, err = called(capsys, *words, *QUICK, "--format", "json")
    assert status == 0, err
    return dict(json.loads(out))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two models by name, an arrival a second for twenty minutes."""
    file = tmp_path / "trace.jsonl"
    lines = [
        json.dumps(
            {
                "arrival": float(second),
                "model": TINY[second % 2],
                "prompt_tokens": 100 + second % 7 * 50,
                "output_tokens": 20 + second % 5,
                "service_seconds": 3.0 + second % 3,
            }
        )
        for second in range(1200)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_tables_tell_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = called(capsys, *PAPER, *FIVE, *RATE, *QUICK)
    assert status == 0 and "Traceback" not in err
    for word in (
        "KV pool",
        "weight pool",
        "P99",
        "95% confidence",
        "Page budget",
        "static partition",
        "monolithic",
        "CrossPool",
        "one rank",
        "Saved:",
        *PAPER,
    ):
        assert word in out


def test_copies_names_and_popularity(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(
        capsys, "3xOLMoE-1B-7B", "big=Mixtral-8x7B", "--devices", "8x80GB", *RATE,
        "--popularity", "zipf:1",
    )  # fmt: skip
    names = [model["name"] for model in found["models"]]
    assert names == ["OLMoE-1B-7B-1", "OLMoE-1B-7B-2", "OLMoE-1B-7B-3", "big"]
    rates = [model["rate"] for model in found["models"]]
    assert rates[0] == pytest.approx(2 * rates[1]) == pytest.approx(4 * rates[3])
    assert sum(rates) == pytest.approx(1.5)


def test_rates_and_contexts_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(
        capsys, "a=OLMoE-1B-7B", "b=OLMoE-1B-7B", "--devices", "3x80GB", "--rate", "a=2,b=0",
        "--lengths", "azure-code", "--context", "a=1024",
    )  # fmt: skip
    assert [model["rate"] for model in found["models"]] == [2, 0]
    assert [model["context"] for model in found["models"]] == [1024, 4096]
    assert found["budget"]["models"][1]["own_bytes"] == 0


def test_users_counts_of_devices(capsys: pytest.CaptureFixture[str]) -> None:
    words = (*PAPER, "--devices", "9x40GB", *RATE)
    found = planned(capsys, *words)
    assert (found["kv_devices"], found["weight_devices"]) == (5, 4)
    found = planned(capsys, *words, "--kv-pool-devices", "2")
    assert (found["kv_devices"], found["weight_devices"]) == (2, 7)
    assert found["models"][0]["served"]["share"] == 0.5
    assert found["models"][1]["paper"]["type"] == "II"


def test_a_trace_that_names_its_models(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path
) -> None:
    models = [str(DEMO / name) for name in TINY[:2]]
    plot = tmp_path / "plan.svg"
    words = ("--devices", "2x128MB", "--trace", str(trace), "--peaks", "--plot", str(plot))
    found = planned(capsys, *models, *words)
    assert [model["rate"] for model in found["models"]] == pytest.approx([0.5, 0.5], rel=0.01)
    assert "60 s" in found["arrivals"]
    assert found["replayed"]["value"] > 0
    assert found["peaks"]["seconds"] == 1199
    assert plot.read_text().count("<svg") == 1
    status, out, _ = called(capsys, *models, *words)
    assert status == 0 and "Peaks of the trace" in out


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_are_the_same_each_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    files = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    for file in files:
        planned(capsys, "OLMoE-1B-7B", "--devices", "2x40GB", *RATE, "--plot", str(file))
    assert files[0].read_bytes() == files[1].read_bytes()


def names(devices: Sequence[Device]) -> list[str]:
    return [device.name for device in devices]


@pytest.mark.parametrize(
    ("devices", "kv", "weight"),
    [
        (("--devices", "256MB", "--device-names", "cpu"), ["cpu"], ["cpu"]),
        (("--devices", "2x256MB", "--device-names", "cpu,cpu:0"), ["cpu"], ["cpu:0"]),
    ],
)
def test_the_yaml_is_a_deployment(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    devices: tuple[str, ...],
    kv: list[str],
    weight: list[str],
) -> None:
    file = tmp_path / "deployment.yaml"
    models = [str(DEMO / name) for name in TINY[:2]]
    models.append(f"glm={DEMO / TINY[2] / 'config.json'}")
    found = planned(capsys, *models, *devices, *RATE, "--context", "glm=2048", "--yaml", str(file))
    draft = read(file)
    assert names(draft.kv_pool_devices) == kv and names(draft.weight_pool_devices) == weight
    ready = prepare(msgspec.structs.replace(draft, port=free_port())).deployment
    assert list(ready.names.values()) == [*TINY[:2], "glm"]
    assert ready.models[2].context_length == 2048
    assert ready.kv_pool_bytes >= found["budget"]["demand"]["value"]
    assert ready.promise == "growth"


def test_gpus_are_written_and_named_by_serve_where_there_are_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deployment.yaml"
    planned(
        capsys, TINY[0] + "=OLMoE-1B-7B", "--devices", "2x40GB", *RATE,
        "--model-path", f"{TINY[0]}={DEMO / TINY[0]}", "--yaml", str(file),
    )  # fmt: skip
    assert names(read(file).kv_pool_devices) == ["cuda:0"]
    assert names(read(file).weight_pool_devices) == ["cuda:1"]
    monkeypatch.setenv("PATH", "")
    status = main(["serve", "--config", str(file), "--port", str(free_port())])
    told = capsys.readouterr().err
    assert status == 2 and "cuda:0, cuda:1: nvidia-smi is not found" in told, told


def test_unlike_models_get_weight_devices_of_their_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Mixtral's layers take twice as long as Phi's; at these rates their loads are alike."""
    file = tmp_path / "deployment.yaml"
    paths = [f"--model-path={name}={DEMO / TINY[0]}" for name in ("long", "short")]
    planned(
        capsys, "long=Mixtral-8x7B", "short=Phi-3.5-MoE", "--devices", "3x141GB",
        "--device-names", "cpu:0,cpu,cpu:0-0", "--weight-pool-devices", "2",
        "--rate", "long=1,short=2.24", "--prompt", "800", "--output", "200", *paths,
        "--yaml", str(file),
    )  # fmt: skip
    draft = read(file)
    assert names(draft.weight_pool_devices) == ["cpu", "cpu:0-0"]
    own = [names(model.weight_pool_devices or ()) for model in draft.models]
    assert sorted(own) == [["cpu"], ["cpu:0-0"]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "models: name at least one"),
        (("Qwen3-30B-A3", *FIVE, *RATE), "Qwen3-30B-A3B"),
        (("0xQwen3-30B-A3B", *FIVE, *RATE), "0 copies"),
        ((PAPER[0], PAPER[0], *FIVE, *RATE), "two models are named"),
        ((PAPER[0], *RATE), "--devices is missing"),
        ((PAPER[0], "--devices", "0x40GB", *RATE), "0 devices"),
        ((PAPER[0], "--devices", "5x", *RATE), "--devices"),
        ((PAPER[0], "--devices", "5xlarge", *RATE), "is no size"),
        ((PAPER[0], *FIVE), "no traffic"),
        ((PAPER[0], *FIVE, "--rate", "0", "--prompt", "5", "--output", "5"), "--rate 0"),
        ((PAPER[0], *FIVE, "--rate", "many", "--prompt", "5", "--output", "5"), "many"),
        ((PAPER[0], *FIVE, "--rate", f"{PAPER[0]}=0", "--prompt", "5", "--output", "5"), "rate"),
        ((*PAPER, *FIVE, "--rate", f"{PAPER[0]}=1", "--prompt", "5", "--output", "5"), PAPER[1]),
        ((PAPER[0], *FIVE, "--rate", "1", "--output", "5"), "--prompt is missing"),
        ((PAPER[0], *FIVE, "--rate", "1", "--prompt", "-3", "--output", "5"), "--prompt"),
        ((PAPER[0], *FIVE, *RATE, "--quantile", "1"), "quantile"),
        ((PAPER[0], *FIVE, *RATE, "--quantile", "99"), "quantile"),
        ((PAPER[0], *FIVE, *RATE, "--level", "0"), "level"),
        ((PAPER[0], *FIVE, *RATE, "--context", "99999"), "40960"),
        ((PAPER[0], *FIVE, *RATE, "--context", "X=5"), "'X'"),
        ((PAPER[0], *FIVE, *RATE, "--device-reserve", "1"), "device reserve"),
        ((*PAPER, "--devices", "3x40GB", *RATE), "give at least 5"),
        ((PAPER[0], *FIVE, *RATE, "--kv-pool-devices", "6"), "kv_pool_devices 6"),
        ((PAPER[0], *FIVE, *RATE, "--page-size", "0"), "page_size 0"),
        ((PAPER[0], *FIVE, *RATE, "--chunk-bytes", "big"), "--chunk-bytes"),
        ((PAPER[0], *FIVE, *RATE, "--samples", "1"), "samples 1"),
        ((PAPER[0], *FIVE, *RATE, "--window", "60"), "--window"),
        ((PAPER[0], *FIVE, *RATE, "--peaks"), "peaks"),
        ((PAPER[0], *FIVE, *RATE, "--plot", "plan.pdf"), "must end in .svg or .png"),
        ((PAPER[0], *FIVE, *RATE, "--plot", "nowhere/plan.svg"), "no folder nowhere"),
        ((PAPER[0], *FIVE, *RATE, "--yaml", "x.yaml"), f"--model-path {PAPER[0]}=DIR"),
        ((PAPER[0], *FIVE, *RATE, "--model-path", "X=/"), "--model-path"),
        ((PAPER[0], *FIVE, *RATE, "--device-names", "cpu"), "1 for 5 device(s)"),
        ((PAPER[0], *FIVE, "--trace", "nowhere.csv"), "nowhere.csv"),
        ((PAPER[0], *FIVE, *RATE, "--popularity", "fame"), "fame"),
        ((PAPER[0], *FIVE, *RATE, "--format", "xml"), "xml"),
        (("--reproduce", "figure9"), "figure9"),
        (("--reproduce", "table1", "--plot", "x.svg"), "table1"),
        (("--reproduce", "figure6", "--device-reserve", "0.99"), "device reserve 0.99"),
    ],
)
def test_nonsense_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = called(capsys, *words)
    assert status == 2
    assert told in err and not out
    assert not list(tmp_path.iterdir())


def test_a_malformed_trace_line_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("prompt_tokens,output_tokens\n12,5\n9,many\n")
    status, _, err = called(capsys, PAPER[0], *FIVE, "--trace", str(file), "--rate", "1")
    assert status == 2
    assert f"{file}:3" in err and "output_tokens" in err and "many" in err


def test_a_trace_without_models_needs_a_popularity(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("arrival,prompt_tokens,output_tokens\n0,12,5\n3,9,7\n")
    words = ("--devices", "9x40GB", "--trace", str(file))
    status, _, err = called(capsys, *PAPER, *words)
    assert status == 2 and "--popularity" in err
    found = planned(capsys, *PAPER, *words, "--popularity", "uniform")
    assert sum(model["rate"] for model in found["models"]) == pytest.approx(2 / 3)
    status, _, err = called(capsys, *PAPER, *words, "--prompt", "5")
    assert status == 2 and "--prompt" in err


def test_reproductions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = called(capsys, "--reproduce", "table1", "--format", "json")
    assert status == 0
    assert all(abs(row["share"] - row["paper"]) < 0.005 for row in json.loads(out))
    status, out, _ = called(capsys, "--reproduce", "figure2", "--format", "json")
    assert [row["way"]["share"] for row in json.loads(out)] == [1, 0.5, 0.25]
    plot = tmp_path / "figure6.svg"
    status, out, _ = called(capsys, "--reproduce", "figure6", "--plot", str(plot))
    assert status == 0 and plot.is_file()
    for word in ("16-32K", "kvcached", "0.182", "~20", "~8.57", "Where ratios differ"):
        assert word in out
    for name in ("table1", "figure2"):
        assert called(capsys, "--reproduce", name)[0] == 0


def test_the_catalogue_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called(capsys, "--catalogue")
    assert status == 0
    assert all(name in out for name in catalogue.names())


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "crosspool.cli.main", "plan"]
    words = [*PAPER, *FIVE, *RATE, *QUICK, "--format", "json"]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kv_devices"] == 1
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "examples:" in done.stdout


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys, crosspool.cli.plan.command; "
        "print([m for m in ('torch', 'sglang', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_weights_are_counted_as_codes_on_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Three models of 61, 58 and 31 GB fit into one host of 64 GB at four bits."""
    words = (*PAPER, "--devices", "64GB", *RATE)
    status, _, err = called(capsys, *words, "--device-names", "cpu")
    assert status == 2 and "weights" in err
    plan = planned(capsys, *words, "--device-names", "cpu", "--weights", "int4")
    held = {model["name"]: model["ffn_bytes"] for model in plan["models"]}
    for name, held_bytes in held.items():
        assert held_bytes / catalogue.load(name).ffn_bytes == pytest.approx(4.25 / 16, rel=0.01)


def test_weights_as_codes_need_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = called(capsys, *PAPER, *FIVE, *RATE, "--weights", "int4")
    assert status == 2
    assert "--weights: only CPUs hold weights as codes" in err


def test_kv_cache_in_floats_of_8_bits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A token takes half the bytes, and the deployment says so."""
    words = [*(f"{name}={DEMO / name}" for name in TINY), "--devices", "1GB", *RATE]
    cpus, file = ["--device-names", "cpu"], tmp_path / "deployment.yaml"
    plain = planned(capsys, *words, *cpus)
    written = ["--kv-cache-dtype", "fp8_e5m2", "--yaml", str(file)]
    rounded = planned(capsys, *words, *cpus, *written)
    for one, other in zip(plain["models"], rounded["models"], strict=True):
        assert one["kv_bytes_per_token"] == 2 * other["kv_bytes_per_token"]
    half = plain["budget"]["demand"]["value"] / 2
    assert rounded["budget"]["demand"]["value"] == pytest.approx(half, rel=0.2)
    assert [model.kv_cache_dtype for model in read(file).models] == ["fp8_e5m2"] * 3
    status, _, err = called(capsys, *words, "--kv-cache-dtype", "fp8_e4m3")
    assert status == 2 and "--kv-cache-dtype: only CPUs hold KV cache in fp8_e4m3" in err


def test_a_weight_pool_for_fewer_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*(f"{name}={DEMO / name}" for name in TINY), "--devices", "1GB"]
    words += ["--rate", "2", "--popularity", "zipf:1", "--prompt", "100", "--output", "20"]
    words += ["--weight-pool-bytes", "6MB", "--wake-bytes-per-s", "1GB", *QUICK]
    file = tmp_path / "deployment.yaml"
    status, out, err = called(capsys, *words, "--yaml", str(file), "--device-names", "cpu")
    assert status == 0, err
    assert "find it resident" in out and "are woken per hour" in out
    assert read(file).weight_pool_bytes == 6_000_000
    found = planned(capsys, *words)["residency"]["found"]
    assert 0.2 < found["hit_share"] < 1 and len(found["models"]) == 3
    status, _, err = called(capsys, *words, "--weight-pool-bytes", "1MB")
    assert status == 2 and "could never be resident" in err and "Traceback" not in err
