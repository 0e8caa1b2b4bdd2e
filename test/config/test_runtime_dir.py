import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig, save
from crosspool.config.device import Device
from crosspool.config.runtime_dir import RuntimeDir, find_running


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="cp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield


def deployment(folder: RuntimeDir, port: int) -> Deployment:
    return Deployment(
        models={0: ModelConfig(name="a", path="/a")},
        next_model=1,
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=(Device("cpu"),),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        port=port,
        runtime_dir=str(folder.path),
    )


def test_a_running_deployment_is_found_by_its_lock() -> None:
    with pytest.raises(ConfigError, match="no CrossPool server"):
        find_running()
    first = RuntimeDir()
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    save(deployment(first, 1))
    assert stat.S_IMODE((first.path / "deployment.json").stat().st_mode) == 0o600
    assert find_running() == deployment(first, 1)
    assert find_running(port=1) == deployment(first, 1)
    with pytest.raises(ConfigError, match="on port 2"):
        find_running(port=2)
    second = RuntimeDir()
    save(deployment(second, 2))
    with pytest.raises(ConfigError, match=r"--port \(.*1.*\)"):
        find_running()
    assert find_running(port=2).runtime_dir == str(second.path)
    first.close()
    assert not first.path.exists()
    assert find_running().port == 2
    second.close()


def test_a_server_of_another_version_hides_no_other() -> None:
    other, own = RuntimeDir(), RuntimeDir()
    save(deployment(other, 1))
    save(deployment(own, 2))
    file = other.path / "deployment.json"
    file.write_text(file.read_text().replace('"models":{', '"models":{"new":0,'))
    assert find_running(port=2) == deployment(own, 2)
    with pytest.raises(ConfigError, match="on port 1 is of another version of CrossPool"):
        find_running(port=1)
    own.close()
    with pytest.raises(ConfigError, match="on port 1 is of another version of CrossPool"):
        find_running()
    other.close()


def test_what_a_killed_launcher_left_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = Path(os.environ["TMPDIR"]) / "stale"
    live = RuntimeDir()
    live.path.rename(stale)
    left = live.path
    left.mkdir()
    (left / "launcher.lock").touch()
    (left / "deployment.json").write_bytes(msgspec.json.encode(deployment(live, 7)))
    with pytest.raises(ConfigError, match="no CrossPool server"):
        find_running()
    RuntimeDir().close()
    assert not left.exists()


def test_what_a_launcher_left_that_was_killed_is_removed_at_the_next_start() -> None:
    """Real processes: one is killed, another lives on."""
    code = (
        "import sys; from crosspool.config.runtime_dir import RuntimeDir;"
        "print(RuntimeDir().path, flush=True); sys.stdin.read()"
    )

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    killed, left = start()
    with killed:
        alive, kept = start()
        with alive:
            killed.kill()
            killed.wait()
            assert left.exists() and kept.exists()
            RuntimeDir().close()
            assert not left.exists() and kept.exists()
            alive.kill()


def test_a_folder_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on the size of files stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(ConfigError) as error:
            RuntimeDir()
    finally:
        signal.signal(signal.SIGXFSZ, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = os.environ["TMPDIR"]
    said = str(error.value)
    assert f"cannot be made in {folder}: File too large: make room there" in said
    assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_tmpdir_that_takes_no_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Python would silently take another folder for temporary files."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    with pytest.raises(ConfigError, match=f"cannot be made in {tmp_path / name}: "):
        RuntimeDir()


def test_too_long_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with pytest.raises(ConfigError, match="TMPDIR"):
        RuntimeDir()
    assert not list(long.iterdir())
