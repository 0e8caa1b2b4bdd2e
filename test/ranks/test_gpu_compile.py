"""Kernels that are compiled ahead are those that a GPU's stages launch, and a cache that is damaged
or foreign is told by name. No GPU is needed, nothing runs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

try:
    importlib.metadata.version("triton")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from crosspool.cli.main import main
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.kernels.residency import Residency
from crosspool.kernels.triton_cache import archive, kernel_cache
from crosspool.kernels.triton_cache.host_modules import Python
from crosspool.kernels.triton_cache.kernel_cache import CompileError, KernelCache
from crosspool.kernels.triton_cache.launches import Launch, recording
from crosspool.kernels.triton_cache.manifest import Manifest
from crosspool.kernels.triton_cache.toolchain import Toolchain
from crosspool.models.registry import specs_of
from crosspool.ranks.gpu import join, load
from crosspool.ranks.gpu.compile import (
    Compiled,
    compile_ahead,
    compile_deployment,
    default_folder,
    deployment_launches,
    telling_of_compilation,
)
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.lane_layout import LinkPlace
from crosspool.weightpool.placement import place

DEMO = Path(join.__file__).parents[2] / "demo"
MODELS = sorted(DEMO.glob("tiny-*"))
CPU = torch.device("cpu")
ALL = {"chunked_prefill_size": 512, "max_running_requests": 64}
FEW = {"chunked_prefill_size": 2, "max_running_requests": 2}
"""Steps of at most 4 rows: three row buckets."""


def deployment(kv_pool: str, weight_pool: str, **options: Any) -> Deployment:
    return Deployment(
        models={n: ModelConfig(path=str(path), name=path.name) for n, path in enumerate(MODELS)},
        next_model=len(MODELS),
        kv_pool_devices=tuple(map(Device, kv_pool.split(","))),
        weight_pool_devices=tuple(map(Device, weight_pool.split(","))),
        kv_pool_bytes=64 << 20,
        weight_pool_bytes=1 << 40,
        **options,
    )


def ahead(of: Deployment) -> dict[str, list[Launch]]:
    specs = specs_of(of.models)
    return deployment_launches(of, specs, place(of, specs), 90)


def entries(launches: dict[str, list[Launch]]) -> dict[str, Launch]:
    return {launch.entry: launch for of_model in launches.values() for launch in of_model}


class Places:
    """Links to devices that are not there."""

    def __init__(self) -> None:
        self.memory = torch.zeros(1 << 16, dtype=torch.uint8)

    def attention_place(self, *_: int) -> LinkPlace:
        return LinkPlace(self.memory.data_ptr(), 1 << 10, 1, 1 << 10, 0)

    ffn_place = attention_place

    def dispatch_tail(self, *_: Any, **__: Any) -> None:
        return None

    reply_tail = dispatch_tail


def product_launches(of: Deployment, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the devices launch, as the product loads and joins them, over CPU tensors."""
    specs, launches = specs_of(of.models), list[Launch]()
    for device in of.devices:
        kv = {}
        for model, s in specs.items() if device in of.kv_pool_devices else ():
            pages = of.kv_pool_bytes // (s.kv_bytes_per_token * of.page_size)
            shape = (pages, s.layers, of.page_size, s.kv_width)
            kv[model] = torch.empty(shape, dtype=getattr(torch, s.dtype))
        parts = load.load_parts(of, device, specs, place(of, specs), kv, on=CPU)
        peers: Any = SimpleNamespace(links=Places(), host=None)
        joined: list[Any] = []
        join_loop = join.join_loop

        def joining(*given: Any, joined: list[Any] = joined, **named: Any) -> Any:
            joined.append(given[2])
            return join_loop(*given, **named)  # noqa: B023

        monkeypatch.setattr(join, "join_loop", joining)
        with contextlib.ExitStack() as resources:
            host = HostSide(CPU)
            join.join_lanes(
                of, device, parts, peers, virtualizer=None, host=host, resources=resources
            )
        monkeypatch.setattr(join, "join_loop", join_loop)
        with recording(90) as recorded:
            for stages in joined[0].values():
                for call in stages.calls.values():
                    call()
        launches += recorded
    return launches


@pytest.mark.parametrize(
    ("kv_pool", "weight_pool"), [("cuda:0", "cuda:0"), ("cuda:0,cuda:1", "cuda:1,cuda:2")]
)
def test_what_is_compiled_ahead_is_what_stages_launch(
    kv_pool: str, weight_pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = deployment(kv_pool, weight_pool, **ALL)
    planned = entries(ahead(of))
    launched = {launch.entry: launch for launch in product_launches(of, monkeypatch)}
    assert {e: launched[e].kernel for e in set(launched) - set(planned)} == {}
    assert {e: planned[e].kernel for e in set(planned) - set(launched)} == {}
    names = {launch.kernel for launch in planned.values()}
    assert {"decode_kernel", "prefill_kernel", "_sample_kernel", "gate_up_kernel"} <= names
    assert ({"_send_kernel", "_combine_kernel", "_take_kernel"} <= names) == ("," in kv_pool)


SPLIT = deployment("cuda:0", "cuda:0,cuda:1", **FEW)


@dataclasses.dataclass(frozen=True)
class Filled:
    folder: Path
    launches: dict[str, list[Launch]]
    first: Compiled


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Kernels of the bundled models on two GPUs."""
    folder, launches = tmp_path_factory.mktemp("kernels"), ahead(SPLIT)
    first = compile_ahead(launches, folder, toolchain=Toolchain.own(), python=Python.of())
    return Filled(folder, launches, first)


@contextlib.contextmanager
def misses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that this process compiles itself."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    with telling_of_compilation() as names:
        yield names


def test_nothing_is_left_to_compile(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert filled.first.compiled > 70 and filled.first.found == 0
    with misses(filled.folder, monkeypatch) as names:
        for launch in product_launches(SPLIT, monkeypatch):
            launch.compile()
    assert names == []
    kernels = {name for name, of in filled.first.entries.items() if of.capability == 90}
    assert kernels == set(entries(filled.launches))
    hosts = [of for of in filled.first.entries.values() if of.capability is None]
    assert {of.kernel for of in hosts} <= {"cuda_utils", "__triton_launcher"} and hosts
    # Here is one that was not planned, and this process says so.
    one = filled.launches[MODELS[0].name][0]
    other = dataclasses.replace(one, options={**one.options, "num_warps": 1})
    with caplog.at_level(logging.WARNING), misses(filled.folder, monkeypatch) as names:
        other.compile()
    assert names == [one.kernel]
    assert one.kernel in caplog.text and "1 kernels were not among" in caplog.text


def again(filled: Filled, folder: Path, toolchain: Toolchain | None = None) -> Compiled:
    return compile_ahead(
        filled.launches, folder, toolchain=toolchain or Toolchain.own(), python=Python.of()
    )


def test_a_second_run_compiles_nothing(filled: Filled) -> None:
    began = time.monotonic()
    second = again(filled, filled.folder)
    assert (second.compiled, second.wrong) == (0, [])
    assert second.found == filled.first.compiled
    assert time.monotonic() - began < 10


def test_headers_of_python_are_needed_only_where_launchers_are_compiled(
    filled: Filled, tmp_path: Path
) -> None:
    bare = dataclasses.replace(Python.of(), include=str(tmp_path / "nothing"))
    own = Toolchain.own()
    found = compile_ahead(filled.launches, filled.folder, toolchain=own, python=bare)
    assert (found.compiled, found.found) == (0, filled.first.compiled)
    model = MODELS[0].name
    one = {model: filled.launches[model][:1]}
    with pytest.raises(CompileError, match=r"nothing has no .*python3-dev"):
        compile_ahead(one, tmp_path / "kernels", toolchain=own, python=bare, workers=1)


def test_a_device_process_compiles_before_it_takes_memory(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All devices' kernels: processes that wait for each other must not compile one by one."""
    calls: list[Compiled] = []

    def compiling(*given: Any) -> Compiled:
        calls.append(compile_deployment(*given))
        return calls[-1]

    def no_driver(ordinal: int, residency: Residency) -> None:
        raise RuntimeError(f"no GPU {ordinal}")

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(load, "CudaBindings", no_driver)
    monkeypatch.setattr(load, "compile_deployment", compiling)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(filled.folder))
    specs = specs_of(SPLIT.models)
    with pytest.raises(RuntimeError, match="no GPU 1"):
        load.load_gpu_ranks(
            SPLIT, Device("cuda:1"), specs, place(SPLIT, specs), None, kept=KeptDescriptors([])
        )
    assert [(call.compiled, call.found) for call in calls] == [(0, filled.first.compiled)]


def test_packed_kernels_are_found_elsewhere(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, folder = tmp_path / "kernels.tar.gz", tmp_path / "elsewhere"
    archive.pack(filled.folder, filled.first.entries, filled.first.identity, packed)
    assert packed.stat().st_size < 4 << 20
    cache = KernelCache(folder, Toolchain.own())
    assert archive.unpack(packed, cache) == len(filled.first.entries)
    kept = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kept == {".cubin", ".json", ".so", ".lock"}  # what launching needs, and no more
    with misses(folder, monkeypatch) as names:
        for launch in entries(filled.launches).values():
            kernel = launch.compile()
            assert kernel.metadata.name == launch.kernel and kernel.kernel
    assert names == []
    second = again(filled, folder)
    assert (second.compiled, second.wrong) == (0, [])


@pytest.fixture
def copied(filled: Filled, tmp_path: Path) -> Path:
    """A folder with the same kernels, which a test may spoil."""
    packed, folder = tmp_path / "kernels.tar.gz", tmp_path / "copy"
    archive.pack(filled.folder, filled.first.entries, filled.first.identity, packed)
    archive.unpack(packed, KernelCache(folder, Toolchain.own()))
    return folder


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damaged_kernels_are_named_and_compiled_again(
    filled: Filled, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = next(p for p in copied.rglob("decode_kernel.cubin"))
    merge = next(p for p in copied.rglob("merge_kernel.json"))
    damage(decode)
    merge.unlink()
    assert main(["compile", "--check", str(copied)]) == 1
    shown = capsys.readouterr().out
    for path, what in ((decode, "damaged"), (merge, "missing")):
        line = f"{path.stem} for sm_90 ({path.parent.name}): {path.name} is {what}"
        assert line in shown, shown
    mended = again(filled, copied)
    assert mended.compiled == 2 and len(mended.wrong) == 2
    assert {line.split()[0] for line in mended.wrong} == {"decode_kernel", "merge_kernel"}
    assert main(["compile", "--check", str(copied)]) == 0


def foreign(folder: Path, field: str, value: str) -> None:
    path = folder / "crosspool-kernels.json"
    known = json.loads(path.read_text())
    known["identity"][field] = value
    path.write_text(json.dumps(known))


def test_foreign_kernels_are_named_and_compiled_again(
    filled: Filled, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(copied, "triton", "3.5.0")
    foreign(copied, "sources", "0" * 64)
    packed = copied / "foreign.tar.gz"
    manifest = Manifest.read(copied)
    assert manifest is not None
    archive.pack(copied, manifest.entries, manifest.identity, packed)
    assert main(["compile", "--unpack", str(packed), "--into", str(copied / "new")]) == 2
    assert f"triton is 3.5.0 instead of {triton.__version__}" in capsys.readouterr().err
    assert not (copied / "new").exists()
    assert main(["compile", "--check", str(copied)]) == 1
    shown = capsys.readouterr().out
    assert "foreign: sources is 000000000000 instead of" in shown, shown
    cache = KernelCache(copied, Toolchain.own())
    with cache.opened() as wrong:
        assert len(wrong) == 1 and f"triton is 3.5.0 instead of {triton.__version__}" in wrong[0]
        assert f"{len(filled.first.entries)} kernels are foreign" in wrong[0]
        assert cache.manifest.entries == {}
    assert not list(copied.rglob("*.cubin"))


def test_a_broken_manifest_or_archive_is_told(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "crosspool-kernels.json").write_text('{"identity": {}}')
    with KernelCache(copied, Toolchain.own()).opened() as wrong:
        assert "crosspool-kernels.json is damaged" in wrong[0]
    packed = copied.parent / "kernels.tar.gz"
    packed.write_bytes(packed.read_bytes()[:5000])
    for words in (["--check", str(packed)], ["--unpack", str(packed)]):
        assert main(["compile", *words]) == 2
        assert f"{packed}" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["entry", "file"])
def test_names_that_lead_out_of_the_folder_are_refused(
    part: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Foreign entries are removed by their names, and packed ones written."""
    beside = copied.parent / "beside"
    beside.mkdir()
    path = copied / "crosspool-kernels.json"
    known = json.loads(path.read_text())
    name, entry = next(iter(known["entries"].items()))
    if part == "entry":
        known["entries"]["../beside"] = entry
    else:
        entry["files"]["../../beside/cubin"] = "0" * 64
    path.write_text(json.dumps(known))
    foreign(copied, "sources", "0" * 64)
    with KernelCache(copied, Toolchain.own()).opened() as wrong:
        assert "no name that Triton's cache gives" in wrong[0]
    assert beside.is_dir() and (copied / name).is_dir()
    packed = copied.parent / "outside.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(path, path.name)
    assert main(["compile", "--unpack", str(packed), "--into", str(copied / "new")]) == 2
    assert "no name that Triton's cache gives" in capsys.readouterr().err


def test_kernels_that_do_not_compile_are_named(filled: Filled, tmp_path: Path) -> None:
    model = MODELS[0].name
    good, bad = filled.launches[model][:2]
    block = max(at for at, value in bad.constants.items() if isinstance(value, int))
    bad = dataclasses.replace(bad, constants={**bad.constants, block: 3})  # no power of two
    with pytest.raises(CompileError, match=f"{bad.kernel} of {model}: ") as caught:
        compile_ahead(
            {model: [bad, good]}, tmp_path, toolchain=Toolchain.own(), python=None, workers=1
        )
    assert good.kernel not in str(caught.value)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None and set(manifest.entries) == {good.entry}


class _Killed(Launch):
    def compile(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class _Stuck(Launch):
    def compile(self) -> None:
        time.sleep(600)


def fill_with(kind: Callable[..., Launch], launch: Launch, folder: Path) -> None:
    given = {f.name: getattr(launch, f.name) for f in dataclasses.fields(launch)}
    compile_ahead(
        {"model": [kind(**given)]}, folder, toolchain=Toolchain.own(), python=None, workers=1
    )


def test_processes_that_die_or_hang_end_the_compilation(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = filled.launches[MODELS[0].name][0]
    with pytest.raises(CompileError, match="was killed, perhaps for want of memory"):
        fill_with(_Killed, launch, tmp_path)
    monkeypatch.setattr(kernel_cache, "_KERNEL_PATIENCE", 2.0)
    with pytest.raises(CompileError, match=f"no kernel was compiled in 2 s; .*{launch.kernel}"):
        fill_with(_Stuck, launch, tmp_path)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children():  # the pool's own thread may just be reaping one
        assert time.monotonic() < deadline, multiprocessing.active_children()
        time.sleep(0.05)


def test_a_folder_is_filled_by_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "_LOCK_PATIENCE", 0.2)
    with (
        KernelCache(tmp_path, Toolchain.own()).opened(),
        pytest.raises(ConfigError, match="another process has compiled kernels into it"),
        KernelCache(tmp_path, Toolchain.own()).opened(),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="name another one in TRITON_CACHE_DIR"),
        KernelCache(tmp_path / "file" / "folder", Toolchain.own()).opened(),
    ):
        pass


def test_the_folder_of_compiled_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = Toolchain.own()
    assert default_folder(own) == tmp_path / "crosspool" / "triton" / f"{own.version}-{own.python}"
    monkeypatch.setenv("TRITON_CACHE_DIR", "named")
    assert default_folder(own) == Path("named")


def test_a_triton_for_another_python(filled: Filled, tmp_path: Path) -> None:
    """Its key is that of its own shared library; whatever else differs is refused."""
    home = Path(triton.__file__).parent
    assert Toolchain.of(home.parent) == Toolchain.own()
    for path in home.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = tmp_path / "triton" / path.relative_to(home)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    info = tmp_path / "triton-3.6.0.dist-info"
    info.mkdir()
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nTag: cp399-cp399-manylinux_2_28_x86_64\n")
    library = tmp_path / "triton" / "_C" / "libtriton.so"
    library.unlink()
    library.write_text("of another Python")
    other = Toolchain.of(tmp_path)
    assert other.python == "cp399" and other.key != Toolchain.own().key
    launch = filled.launches[MODELS[0].name][0]
    with other.used():
        assert launch.entry not in filled.first.entries
    assert launch.entry in filled.first.entries
    source = tmp_path / "triton" / "compiler" / "compiler.py"
    source.unlink()
    source.write_text("")
    with pytest.raises(ConfigError, match=r"triton/compiler/compiler\.py is not as in Triton"):
        Toolchain.of(tmp_path)
    with pytest.raises(ConfigError, match="holds no Triton"):
        Toolchain.of(tmp_path / "triton")


def test_the_command(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the models' config.json is needed, and flags are the server's."""
    words = ["compile", "--into", str(copied), "--kv-pool-bytes", str(SPLIT.kv_pool_bytes)]
    for path in MODELS:
        folder = tmp_path / path.name
        folder.mkdir()
        (folder / "config.json").write_text((path / "config.json").read_text())
        words += ["--model-path", str(folder)]
    words += ["--kv-pool-devices", "cuda:0", "--weight-pool-devices", "cuda:0,cuda:1"]
    words += ["--chunked-prefill-size", "2", "--max-running-requests", "2"]
    assert main(words) == 2
    assert "--capability is missing" in capsys.readouterr().err
    damage(next(copied.rglob("decode_kernel.cubin")))
    packed = tmp_path / "packed.tar.gz"
    assert main([*words, "--capability", "90", "--pack", str(packed)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 compiled, ") and f"packed into {packed}" in shown, shown
    assert main(["compile", "--check", str(packed)]) == 0
    assert "tiny-qwen3-moe: " in capsys.readouterr().out
    assert main(["compile", "--check", str(packed), "--lanes", "2"]) == 2
    assert "--lanes does not go with --check" in capsys.readouterr().err
