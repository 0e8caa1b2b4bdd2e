"""The bundle for GPU machines, unpacked where only such a machine's packages are, starts the
report; what is damaged, too large or missing is told by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_bundle
import gpu_bundle_kernels
import gpu_bundle_parts
import gpu_bundle_run
import pytest
from crosspool.kernels import native
from support.bare_environment import BareEnvironment, repacked
from support.packages import installed

from benchmark.gpu_report.platform import Scale

ROOT = Path(__file__).parents[1]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MODEL = "tiny-qwen3-moe"

pytestmark = pytest.mark.skipif(not installed("triton"), reason="triton is not installed")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of what the bundle packs, without a package index."""
    folder = tmp_path_factory.mktemp("wheels")
    for requirement in gpu_bundle_parts.needed_packages():
        name = gpu_bundle_parts.normalised(requirement)
        if installed(name):
            repacked(name, folder)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Iterator[Path]:
    """A bundle for this Python, with few of the kernels."""
    out = tmp_path_factory.mktemp("dist")
    libraries = Path(native.library()._name).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_bundle_parts, "WORK", tmp_path_factory.mktemp("work"))
        patch.setattr(gpu_bundle_parts, "FOR_THE_REPORT", ())
        launches = gpu_bundle_kernels.report_launches

        def few(scale: Any, capability: int, models: Any) -> Any:
            small = dataclasses.replace(scale, buckets=(1,), layers=1)
            found = launches(small, capability, models)
            return {name: of_model[:2] for name, of_model in found.items()}

        patch.setattr(gpu_bundle_kernels, "report_launches", few)
        words = ["--python", PYTHON, "--libraries", str(libraries), "--wheels", str(wheels)]
        assert gpu_bundle.main([*words, "--models", MODEL, "--out", str(out)]) == 0
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Path:
    into = tmp_path_factory.mktemp("elsewhere")
    subprocess.run(["tar", "xf", archive], cwd=into, check=True)
    return next(into.iterdir())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> BareEnvironment:
    return BareEnvironment(tmp_path_factory.mktemp("bare") / "venv")


def test_bundle_starts_the_report_in_a_bare_environment(
    bundle: Path, bare: BareEnvironment, tmp_path: Path
) -> None:
    assert bare.run(["python3", "-c", "import torch, triton"], tmp_path).returncode == 0
    absent = ("msgspec", "zmq", "setproctitle", "crosspool", "sglang", "fastapi", "pip")
    find = f"import importlib.util as u; print([n for n in {absent} if u.find_spec(n)])"
    assert bare.run(["python3", "-c", find], tmp_path).stdout == "[]\n"

    done = bare.run([bundle / "run", "--only", "machine", "device", "--out", "out"], tmp_path, 300)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((bundle / "bundle.json").read_text())
    said = done.stdout
    assert f"{len(manifest['files'])} files are whole" in said
    assert f"python    {PYTHON:14}{PYTHON}" in said
    assert "there is no GPU here: nvidia-smi lists none" in said
    assert f"msgspec {manifest['packages']['msgspec']}" in said
    assert "unpacked into" in said and "not used" not in said  # the kernels are for this Triton
    assert said.startswith((tmp_path / "out" / "bundle.txt").read_text())
    page = (tmp_path / "out" / "report.md").read_text()
    assert "sees no GPU" in page and "| torch |" in page, page
    assert any((bundle / "triton-cache").glob("*/*.cubin"))


def test_programs_of_the_bundle_see_nothing_of_the_source_tree(
    bundle: Path, bare: BareEnvironment, tmp_path: Path
) -> None:
    words = ["--module", "site"]
    done = bare.run([bundle / "run", *words], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = done.stdout[done.stdout.index("sys.path = [") :]
    assert str(bundle / "site") in paths and str(bundle / "source" / "python") in paths
    assert str(ROOT) not in paths


def test_tests_of_the_bundle_find_the_packed_packages(
    bundle: Path, bare: BareEnvironment, tmp_path: Path
) -> None:
    tests = bundle / "source" / "test" / "ranks" / "gpu" / "test_gpu_device_process.py"
    words = ["--module", "pytest", "-rs", "-m", "gpu", "-p", "no:cacheprovider", str(tests)]
    done = bare.run([bundle / "run", *words], tmp_path)
    assert done.returncode == 0 and "skipped" in done.stdout, done.stdout + done.stderr
    assert "is not installed" not in done.stdout


def test_a_damaged_file_is_named(bundle: Path, bare: BareEnvironment, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("triton-cache"))
    library = "source/python/crosspool/kernels/libcrosspool_cpu.so"
    with (copy / library).open("r+b") as file:
        file.seek(1000)
        file.write(b"damaged")
    gone = "source/benchmark/gpu.py"
    (copy / gone).unlink()
    done = bare.run([copy / "run", "--check"], tmp_path)
    assert done.returncode == 2, done.stdout
    assert f"{library} is damaged" in done.stdout
    assert f"{gone} cannot be read: No such file or directory" in done.stdout
    assert len(done.stdout.splitlines()) == 3

    (copy / "bundle.json").write_text("{")
    done = bare.run([copy / "run", "--changed", "--check"], tmp_path)
    assert done.returncode == 2 and "bundle.json cannot be read" in done.stdout


def test_differences_of_the_machine_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {
        "python": "3.9",
        "glibc": "2.34",
        "triton": "1.0",
        "nvshmem": "3.4.5",
        "architecture": "90",
        "packages": {"msgspec": "0.23.0"},
        "left_out": {"libcrosspool_cuda.so": "nvcc was not there"},
    }
    monkeypatch.setattr(gpu_bundle_run, "_gpu", lambda: "NVIDIA A100 sm_80")
    versions = {"triton": "2.0", "nvidia-nvshmem-cu13": "3.8.0"}
    monkeypatch.setattr(gpu_bundle_run, "_version", lambda name: versions.get(name, "none"))
    said = "\n".join(gpu_bundle_run.compared(manifest))
    assert f"Python {PYTHON} cannot load the packages for Python 3.9: msgspec 0.23.0" in said
    assert "Triton 2.0 does not use kernels compiled by 1.0: they are compiled here instead" in said
    assert "linked with NVSHMEM 3.4.5, and may refuse to work with 3.8.0" in said
    assert "the bundle's libraries and kernels are for sm_90" in said
    assert "not in the bundle: libcrosspool_cuda.so: nvcc was not there" in said
    folder = Path("/nowhere")
    assert "site" not in gpu_bundle_run.environment_of(folder, manifest)["PYTHONPATH"]


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    kernels = tmp_path / "source" / "python" / "crosspool" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "libcrosspool_cuda.so").write_bytes(b"\x7fELF for another machine")
    (line,) = gpu_bundle_run.unloadable(tmp_path)
    assert line.startswith("libcrosspool_cuda.so cannot be loaded here (")


def test_kernels_of_other_sources_are_not_used(
    bundle: Path, bare: BareEnvironment, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("triton-cache"))
    changed = "source/python/crosspool/kernels/triton/norm.py"
    with (copy / changed).open("a") as file:
        file.write("\n")
    assert bare.run([copy / "run", "--check"], tmp_path).returncode == 2
    done = bare.run([copy / "run", "--changed", "--check"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"changed: {changed} is damaged" in done.stdout
    assert "compiled kernels are not used; they are compiled here instead" in done.stdout
    assert "foreign: sources" in done.stdout


def test_kernels_of_every_check_are_compiled() -> None:
    scale = Scale(models=(MODEL,), layers=1, buckets=(1, 4))
    found = gpu_bundle_kernels.report_launches(scale, 90, [MODEL, scale.shape])
    wanted = {"_linear_kernel", "decode_kernel", "gate_up_kernel", "down_few_kernel"}
    for name, weights in ((MODEL, "*fp32"), (scale.shape, "*bf16")):
        assert wanted <= {launch.kernel for launch in found[name]}
        assert all(launch.capability == 90 for launch in found[name])
        linear = next(launch for launch in found[name] if launch.kernel == "_linear_kernel")
        assert weights in linear.signature.values()
    # Stages that exchange rows with another device, too.
    assert "_send_kernel" in {launch.kernel for launch in found[MODEL]}


def test_a_bundle_over_the_limit_is_refused_and_names_what_is_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wheels: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gpu_bundle, "compiled_kernels", lambda *_: None)
    monkeypatch.setattr(gpu_bundle_parts, "FOR_THE_REPORT", ())
    libraries = Path(native.library()._name).parent
    words = ["--python", PYTHON, "--libraries", str(libraries), "--wheels", str(wheels)]
    assert gpu_bundle.main([*words, "--out", str(tmp_path), "--limit", "2"]) == 2
    said = capsys.readouterr().err
    assert "more than 2 MiB" in said and "tiny-qwen3-moe/model.safetensors (4.3 MiB)" in said
    assert not any(tmp_path.iterdir())


def test_without_nvcc_nothing_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nvcc" else which(name))
    assert gpu_bundle.main(["--out", str(tmp_path)]) == 2
    assert "nvcc is not on PATH" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_libraries_are_built_and_load_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_index(*_: object) -> None:
        raise gpu_bundle_parts.BundleError("no index is reached")

    def run_with_one_path(command: list[str]) -> None:
        """The kernels of the CPU take most of the time, and how many paths there are says nothing
        about where libraries find each other."""
        one = ["-DCROSSPOOL_KERNEL_PATHS=portable"] if "-S" in command else []
        run([*command, *one])

    run = gpu_bundle_parts.run
    monkeypatch.setattr(gpu_bundle_parts, "run", run_with_one_path)
    monkeypatch.setattr(gpu_bundle_parts, "pip", no_index)
    monkeypatch.setattr(gpu_bundle_parts, "WORK", tmp_path / "work")
    made = gpu_bundle_parts.Bundle(tmp_path / "made", PYTHON, "90")
    gpu_bundle_parts.build_libraries(made)
    assert made.left_out == {"libcrosspool_nvshmem.so": "no index is reached"}
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "work")  # nothing may be found where it was built
    assert gpu_bundle_run.unloadable(moved) == []
    program = moved / made.program.relative_to(made.folder)
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60)
    assert "limits" in done.stdout + done.stderr and "error while loading" not in done.stderr


def test_an_unknown_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = gpu_bundle_parts.Bundle(tmp_path, PYTHON, "90")
    with pytest.raises(gpu_bundle_parts.BundleError, match="the report has no Qwen4"):
        gpu_bundle_kernels.compiled_kernels(bundle, None, ["Qwen4"], None)


def test_the_archive_holds_what_git_knows_and_nothing_else(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    known = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    packed = {name.removeprefix("source/") for name in names if name.startswith("source/")}
    built = {name for name in packed if name.endswith(".so") or name.startswith("build/")}
    assert packed - built <= set(known)
    assert "python/crosspool/ranks/gpu/load.py" in packed
    assert "test/support/one_gpu.py" in packed and "Makefile" in packed
    assert not any(name.startswith(("docs/", "benchmark/results/")) for name in packed)
