"""The supervisor with real stand-in processes; it runs in a process of its own, as the launcher
does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
log, name = Path(sys.argv[1]), sys.argv[2]
(log.parent / f"{name}.pid").write_text(str(os.getpid()))
def note(word):
    with log.open("a") as file:
        file.write(f"{name} {word}\\n")
def end(*_):
    while "drains" in sys.argv and "device start 2" not in log.read_text():
        time.sleep(0.02)
    note("end")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else end)
number = sys.argv[sys.argv.index("--incarnation") + 1] if "--incarnation" in sys.argv else None
if number and "fails" in sys.argv:
    note(f"failed start {number}")
    sys.exit(int(sys.argv[sys.argv.index("fails") + 1]))
if "silent" not in sys.argv:
    note(f"start {number}" if number else "start")
if "dies" in sys.argv:
    time.sleep(0.5)
    sys.exit(int(sys.argv[-1]))
if "parent" in sys.argv:
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
time.sleep(600)
"""

FORK_SERVER = """
import json, runpy, sys, time
from functools import partial
from crosspool.transport.forking import serve_forks
def become(argv, incarnation):
    sys.argv = argv + (["--incarnation", str(incarnation)] if incarnation > 1 else [])
    try:
        runpy.run_path(argv[0])
    except SystemExit as end:
        return end.code
seconds, status, processes = json.loads(sys.argv[1])
time.sleep(seconds)
if status:
    sys.exit(status)
serve_forks({name: partial(become, argv) for name, argv in processes.items()}, int(sys.argv[3]))
"""

LAUNCHER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from crosspool.cli.child import ProcessSpec
from crosspool.cli.loss import Loss
from crosspool.cli.restarts import Restarts
from crosspool.cli.supervisor import Supervisor
folder = Path(sys.argv[1])
log, hang, anew = folder / "log", folder / "hang", folder / "anew"
def spec(name, *words):
    argv = [sys.executable, str(folder / "stand_in.py"), str(log), name, *words]
    device = name if name == "device" else None
    group = "group" if "grouped" in words else None
    takes = "takes" in words
    restartable = bool(device or group) or "forked" in words or takes
    return ProcessSpec(
        name=name,
        argv=argv,
        device=device,
        restartable=restartable,
        group=group,
        takes_later=takes,
    )
def note(word):
    with log.open("a") as file:
        file.write(word + "\\n")
def elsewhere():
    if anew.exists() and supervisor.replace_all(lambda spec: spec.incarnation + 6):
        anew.unlink()
        note("all replaced")
    if (folder / "far").exists():
        (folder / "far").unlink()
        return [Loss(spec=ProcessSpec(name="far", argv=[]), status=None, told="far is lost")]
    return []
stages = [[spec(*name.split()) for name in stage.split(",")] for stage in sys.argv[2].split(";")]
forked = [spec for stage in stages for spec in stage if "forked" in spec.argv]
plan = [*json.loads(sys.argv[4]), {spec.name: spec.argv[1:] for spec in forked}]
fork_server = ProcessSpec(
    name="fork server",
    argv=[sys.executable, str(folder / "fork_server.py"), json.dumps(plan)],
    restartable=True,
    kept="kept" in sys.argv,
)
supervisor = Supervisor(
    [
        [replace(spec, forked_by=fork_server if spec in forked else None) for spec in stage]
        for stage in stages
    ],
    is_ready=lambda: log.exists() and log.read_text().count(" start\\n") == sum(map(len, stages)),
    restarts=Restarts(int(sys.argv[5])),
    is_back=lambda spec: f"{spec.name} start {spec.incarnation}" in log.read_text(),
    on_ready=lambda: note("ready"),
    on_restart=lambda loss: note(f"gone {loss.spec.device} {loss.spec.incarnation}: {loss.cause}"),
    on_loss=lambda loss: note(f"lost {loss.spec.device}: {loss.cause}"),
    on_stop=lambda spec, stopped: note(f"{spec.name} {'stopped' if stopped else 'continued'}"),
    hangs=lambda stopped: (
        {("device", 1): "it does nothing"} if hang.exists() and not stopped else {}
    ),
    elsewhere=lambda: elsewhere(),
    say=lambda text: note(f"say {text}"),
    watchdog_timeout=1.5,
    failure_grace=float(sys.argv[3]),
    drain_timeout=float(sys.argv[6]),
)
sys.exit(supervisor.run())
"""


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Run:
    def __init__(
        self,
        folder: Path,
        stages: str,
        *,
        grace: float = 0.0,
        fork_server: tuple[float, int] = (0, 0),
        restart_limit: int = 0,
        drain_timeout: float = 1.0,
        kept: bool = False,
    ) -> None:
        """``stages``: processes and their words, one stage after the other; ``fork_server``:
        seconds that it sleeps first, and the exit status with which it then fails, if not 0;
        ``kept``: whether it is started again before it is needed."""
        (folder / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
        (folder / "fork_server.py").write_text(FORK_SERVER)
        (folder / "launcher.py").write_text(textwrap.dedent(LAUNCHER))
        self.log_file = folder / "log"
        self.process = subprocess.Popen(
            [
                *[sys.executable, str(folder / "launcher.py"), str(folder), stages, str(grace)],
                *[json.dumps(fork_server), str(restart_limit), str(drain_timeout), "kept" * kept],
            ]
        )
        self.seen: dict[int, psutil.Process] = {}

    @property
    def log(self) -> list[str]:
        return self.log_file.read_text().splitlines() if self.log_file.exists() else []

    def wait_for(self, line: str, times: int = 1) -> None:
        deadline = time.monotonic() + 20
        while self.log.count(line) < times:
            assert time.monotonic() < deadline, f"{line} not in {self.log}"
            time.sleep(0.02)
        self.look()

    def look(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self.seen[process.pid] = process

    def end(self) -> int:
        return self.process.wait(timeout=20)

    def orphans(self) -> list[psutil.Process]:
        deadline = time.monotonic() + 2
        while alive := [process for process in self.seen.values() if is_alive(process)]:
            if time.monotonic() > deadline:
                return alive
            time.sleep(0.02)
        return []


@pytest.fixture
def run(tmp_path: Path):
    runs: list[Run] = []

    def start(stages: str, **more: Any) -> Run:
        runs.append(Run(tmp_path, stages, **more))
        return runs[-1]

    yield start
    for one in runs:
        one.process.kill()
        one.process.wait()
        for process in one.seen.values():
            if process.is_running():
                process.kill()


def test_sigterm_stops_stage_by_stage(run) -> None:
    server = run("http;scheduler;detokenizer;device,other")
    server.wait_for("ready")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    ends = [line.split()[0] for line in server.log if line.endswith(" end")]
    assert ends[:3] == ["http", "scheduler", "detokenizer"]
    assert set(ends[3:]) == {"device", "other"}
    assert len(server.seen) == 5 and not server.orphans()


@pytest.mark.parametrize(("status", "expected"), [(1, 1), (0, 1), (2, 2)])
def test_a_lost_process_stops_the_others(run, status: int, expected: int) -> None:
    server = run(f"http;device dies {status}")
    server.wait_for("ready")
    assert server.end() == expected
    assert f"lost device: device exited with status {status}" in server.log
    assert "http end" in server.log
    assert not server.orphans()


def test_others_live_on_for_the_grace_period(run) -> None:
    server = run("http;device", grace=1.0)
    server.wait_for("ready")
    (device,) = [p for p in server.seen.values() if "device" in p.cmdline()]
    began = time.monotonic()
    device.send_signal(signal.SIGKILL)
    server.wait_for("lost device: device was killed by SIGKILL")
    assert "http end" not in server.log
    assert server.end() == 1
    assert time.monotonic() - began > 1.0
    assert not server.orphans()


def test_all_are_replaced_and_the_fork_server_stays(run, tmp_path: Path) -> None:
    server = run("http;device forked", restart_limit=5)
    server.wait_for("ready")
    device = int((tmp_path / "device.pid").read_text())  # it has the fork server's command line
    forks = (p for p in server.seen.values() if "fork_server.py" in " ".join(p.cmdline()))
    (before,) = (p for p in forks if p.pid != device)
    (tmp_path / "anew").touch()
    server.wait_for("device start 7")
    server.wait_for("http start 7")
    assert server.log.count("all replaced") == 1
    assert "device end" not in server.log  # killed, not asked
    assert is_alive(before)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


def test_a_loss_on_another_host_ends_the_processes_of_this_one(run, tmp_path: Path) -> None:
    server = run("http;device", grace=0.5, restart_limit=5)
    server.wait_for("ready")
    (tmp_path / "far").touch()
    server.wait_for("lost None: far is lost")
    assert server.end() == 1
    assert {"say far is lost", "http end", "device end"} <= set(server.log)
    assert not server.orphans()


def test_no_grace_when_the_first_stage_itself_is_lost(run) -> None:
    server = run("http dies 3;device", grace=600.0)
    assert server.end() == 1
    assert "device end" in server.log
    assert not server.orphans()


def test_loss_before_ready_stops_at_once(run) -> None:
    server = run("http silent;device dies 2", grace=600.0)
    assert server.end() == 2
    assert "ready" not in server.log


def find(server: Run, name: str) -> psutil.Process:
    server.look()
    (found,) = [p for p in server.seen.values() if name in p.cmdline()]
    return found


def test_a_stopped_process_that_continues_is_told_of_and_not_lost(run) -> None:
    server = run("http;device")
    server.wait_for("ready")
    device = find(server, "device")
    for times in (1, 2):
        device.send_signal(signal.SIGSTOP)
        server.wait_for("device stopped", times)
        device.send_signal(signal.SIGCONT)
        server.wait_for("device continued", times)
    time.sleep(1.6)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


@pytest.mark.parametrize("name", ["http", "device"])
def test_a_process_that_stays_stopped_ends_the_others_and_itself(run, name: str) -> None:
    """Within the watchdog's time and the grace, and although it does not take SIGTERM."""
    server = run("http;device", grace=0.5)
    server.wait_for("ready")
    began = time.monotonic()
    find(server, name).send_signal(signal.SIGSTOP)
    assert server.end() == 1
    assert 1.4 < time.monotonic() - began < 10
    assert f"say {name} was stopped by a signal and did not continue in time" in server.log
    assert not server.orphans()


def test_a_dead_device_is_started_again_and_the_others_go_on(run) -> None:
    server = run("http;device", restart_limit=5)
    server.wait_for("ready")
    others = find(server, "http").pid
    for number in (1, 2):
        pid = find(server, "device").pid
        os.kill(pid, signal.SIGKILL)
        server.wait_for(f"gone device {number}: device was killed by SIGKILL")
        server.wait_for(f"device start {number + 1}")
        server.wait_for(f"say device was killed by SIGKILL; it is started again (restart {number})")
        del server.seen[pid]
    assert find(server, "http").pid == others
    assert not any(line.startswith("lost") for line in server.log)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert server.log[-1] == "device end" and not server.orphans()


def wait_for_child(server: Run) -> psutil.Process:
    """The child of a process that is a parent."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        server.look()
        for process in server.seen.values():
            if "time.sleep(600)" in " ".join(process.cmdline()):
                return process
    raise AssertionError("there is none")


@pytest.mark.parametrize("forked", ["", " forked"])
def test_a_process_takes_those_of_later_stages_along(run, forked: str) -> None:
    server = run(f"http;scheduler takes{forked};detokenizer{forked};device,other", restart_limit=5)
    server.wait_for("ready")
    for number in (1, 2):
        dead = [int(file.read_text()) for file in server.log_file.parent.glob("[!h]*.pid")]
        assert len(dead) == 4
        os.kill(int((server.log_file.parent / "scheduler.pid").read_text()), signal.SIGKILL)
        for name in ("scheduler", "detokenizer", "device", "other"):
            server.wait_for(f"{name} start {number + 1}")
        assert not any(map(psutil.pid_exists, dead))
        for pid in dead:
            server.seen.pop(pid, None)
    assert sum(line.startswith("http start") for line in server.log) == 1
    said = [line for line in server.log if line.startswith("say")]
    assert said == [
        f"say scheduler was killed by SIGKILL; it is started again (restart {number})"
        for number in (1, 2)
    ]
    assert not any(line.startswith("gone device") for line in server.log)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


def test_the_children_of_a_replaced_process_leave_nothing_behind(run) -> None:
    """The launcher is their parent once their own has died, so it has to look at how they ended."""
    server = run("http;scheduler takes forked parent", restart_limit=5)
    server.wait_for("ready")
    for number in (1, 2):
        child = wait_for_child(server)
        child.parent().kill()
        server.wait_for(f"scheduler start {number + 1}")
        assert not psutil.pid_exists(child.pid)
        server.seen.clear()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_processes_that_die_together_with_the_one_that_takes_them_are_replaced_once(run) -> None:
    server = run("http;scheduler takes;device", restart_limit=5)
    server.wait_for("ready")
    both = [find(server, name) for name in ("device", "scheduler")]
    launcher = psutil.Process(server.process.pid)
    launcher.suspend()
    while launcher.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    for process in both:
        process.kill()
    while any(map(is_alive, both)):
        time.sleep(0.01)
    launcher.resume()
    for name in ("device", "scheduler"):
        server.wait_for(f"{name} start 2")
    time.sleep(1)
    assert sum(" start " in line for line in server.log) == 2
    assert [line for line in server.log if line.startswith(("gone", "say"))] == [
        "say scheduler was killed by SIGKILL; it is started again (restart 1)",
        "gone None 1: scheduler was killed by SIGKILL",
    ]
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_device_that_dies_at_each_start_ends_the_server_with_the_cause(run) -> None:
    server = run("http;device fails 1", restart_limit=3)
    server.wait_for("ready")
    began = time.monotonic()
    os.kill(find(server, "device").pid, signal.SIGKILL)
    assert server.end() == 1
    assert time.monotonic() - began < 10
    assert [line for line in server.log if line.startswith("device failed")] == [
        f"device failed start {number}" for number in (2, 3, 4)
    ]
    assert "lost device: device exited with status 1" in server.log
    assert "http end" in server.log and not server.orphans()


def test_a_device_that_finds_a_mistake_of_the_user_is_not_started_again(run) -> None:
    server = run("http;device fails 2", restart_limit=5)
    server.wait_for("ready")
    os.kill(find(server, "device").pid, signal.SIGKILL)
    assert server.end() == 2
    assert server.log.count("device failed start 2") == 1
    assert "device failed start 3" not in server.log


def test_a_device_that_dies_too_often_ends_the_server(run) -> None:
    """Although each of its starts succeeds."""
    server = run("http;device", restart_limit=2)
    server.wait_for("ready")
    for number in (2, 3):
        os.kill(find(server, "device").pid, signal.SIGKILL)
        server.wait_for(f"device start {number}")
        time.sleep(0.5)  # so that the launcher sees it, too
        server.seen.clear()
    os.kill(find(server, "device").pid, signal.SIGKILL)
    assert server.end() == 1
    assert "lost device: device was killed by SIGKILL" in server.log


def test_a_device_that_stays_stopped_is_killed_and_replaced(run) -> None:
    server = run("http;device", restart_limit=5)
    server.wait_for("ready")
    device = find(server, "device")
    device.send_signal(signal.SIGSTOP)
    server.wait_for("device start 2")
    assert not is_alive(device)
    assert "device stopped" not in server.log, "http need not know of it"
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_device_that_hangs_is_killed_and_replaced(run) -> None:
    server = run("http;device", restart_limit=5)
    server.wait_for("ready")
    device = find(server, "device")
    server.log_file.with_name("hang").touch()
    server.wait_for("gone device 1: device hangs: it does nothing")
    server.wait_for("device start 2")
    assert not is_alive(device)
    time.sleep(0.5)  # the next one does not count as hanging, since it is another one
    assert "gone device 2" not in server.log
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_device_that_hangs_ends_the_server_where_none_is_replaced(run) -> None:
    server = run("http;device")
    server.wait_for("ready")
    server.log_file.with_name("hang").touch()
    assert server.end() == 1
    assert "lost device: device hangs: it does nothing" in server.log


def test_a_stopped_device_does_not_hang(run) -> None:
    server = run("http;device", restart_limit=5)
    server.wait_for("ready")
    device = find(server, "device")
    device.send_signal(signal.SIGSTOP)
    server.wait_for("say device was stopped by a signal")
    server.log_file.with_name("hang").touch()
    time.sleep(0.5)
    assert is_alive(device)
    server.log_file.with_name("hang").unlink()
    device.send_signal(signal.SIGCONT)
    server.wait_for("say device continues")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_device_that_was_stopped_for_a_moment_is_not_replaced(run) -> None:
    server = run("http;device", restart_limit=5)
    server.wait_for("ready")
    device = find(server, "device")
    for times in (1, 2):
        device.send_signal(signal.SIGSTOP)
        server.wait_for("say device was stopped by a signal", times)
        time.sleep(1.2)
        device.send_signal(signal.SIGCONT)
        server.wait_for("say device continues", times)
    assert is_alive(device)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


@pytest.mark.parametrize("words", ["", " forked"])
def test_a_device_that_dies_while_requests_drain_is_replaced(run, words: str) -> None:
    server = run(f"http drains;device{words}", restart_limit=5, drain_timeout=15.0)
    server.wait_for("ready")
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("say stopping once requests in flight are done; a second signal stops at once")
    os.kill(int((server.log_file.parent / "device.pid").read_text()), signal.SIGKILL)
    server.wait_for("http end")
    assert server.end() == 0
    assert "gone device 1: device was killed by SIGKILL" in server.log
    assert "device end" in server.log and not server.orphans()


def test_a_loss_that_nothing_replaces_is_told_while_requests_drain(run) -> None:
    server = run("http stubborn;device", drain_timeout=3.0)
    server.wait_for("ready")
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("say stopping once requests in flight are done; a second signal stops at once")
    find(server, "device").kill()
    server.wait_for("lost device: device was killed by SIGKILL")
    assert server.end() == 0 and not server.orphans()


def test_stubborn_process_is_killed_after_the_drain_timeout(run) -> None:
    server = run("http stubborn;device")
    server.wait_for("ready")
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 0
    assert "say killing http, which did not end after SIGTERM" in server.log
    assert not server.orphans()


def test_second_signal_kills_at_once(run) -> None:
    server = run("http stubborn;device stubborn", drain_timeout=60.0)
    server.wait_for("ready")
    server.process.send_signal(signal.SIGINT)
    server.wait_for("say stopping once requests in flight are done; a second signal stops at once")
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 0
    assert not server.orphans()


def test_grandchildren_do_not_survive(run) -> None:
    server = run("http parent;device parent")
    server.wait_for("ready")
    deadline = time.monotonic() + 10
    while len(server.seen) < 4 and time.monotonic() < deadline:
        server.look()
    assert len(server.seen) == 4
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


def test_children_die_with_a_killed_launcher(run) -> None:
    server = run("http;device")
    server.wait_for("ready")
    os.kill(server.process.pid, signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    assert len(server.seen) == 2 and not server.orphans()


FORKED = "http forked;scheduler forked;detokenizer forked;device"


def test_forked_processes_are_children_like_others(run) -> None:
    """Each forked process is the launcher's child and leads a group of its own, as the fork server
    does, and they stop stage by stage."""
    server = run(FORKED)
    server.wait_for("ready")
    launcher = psutil.Process(server.process.pid)
    children = launcher.children()
    assert len(children) == len(launcher.children(recursive=True)) == 5
    assert {os.getpgid(child.pid) for child in children} == {child.pid for child in children}
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    ends = [line.split()[0] for line in server.log if line.endswith(" end")]
    assert ends == ["http", "scheduler", "detokenizer", "device"]
    assert not server.orphans()


@pytest.mark.parametrize(("status", "expected"), [(1, 1), (0, 1), (2, 2)])
def test_a_forked_process_that_is_lost_stops_the_others(run, status: int, expected: int) -> None:
    server = run(f"http forked;scheduler forked dies {status};device")
    server.wait_for("ready")
    assert server.end() == expected
    assert f"say scheduler exited with status {status}" in server.log
    assert "http end" in server.log and "device end" in server.log
    assert not server.orphans()


def test_forked_processes_die_with_a_killed_launcher(run) -> None:
    server = run(FORKED)
    server.wait_for("ready")
    os.kill(server.process.pid, signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    assert len(server.seen) >= 4 and not server.orphans()


def test_a_fork_server_that_fails_is_a_loss(run) -> None:
    server = run(FORKED, grace=600.0, fork_server=(0.3, 2))
    assert server.end() == 2
    assert "say fork server exited with status 2" in server.log
    assert "device end" in server.log
    assert not server.orphans()


def find_fork_server(server: Run) -> psutil.Process:
    """The oldest of those with its command line, which all have that it forked."""
    server.look()
    alike = [p for p in server.seen.values() if is_alive(p) and "--launcher-fd" in p.cmdline()]
    return min(alike, key=psutil.Process.create_time)


def test_a_fork_server_that_nobody_waits_for_is_no_loss(run) -> None:
    server = run(FORKED)
    server.wait_for("ready")
    find_fork_server(server).send_signal(signal.SIGKILL)
    server.wait_for("say fork server was killed by SIGKILL; it is started again when it is needed")
    time.sleep(0.5)
    assert server.process.poll() is None
    assert not [line for line in server.log if line.endswith(" end")]
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


def pid_of(server: Run, name: str) -> int:
    """The pid of the process that was the last to start under this name."""
    return int((server.log_file.parent / f"{name}.pid").read_text())


@pytest.mark.parametrize("name", ["http", "detokenizer"])
def test_a_forked_process_that_dies_is_forked_again(run, name: str) -> None:
    """Whichever stage it is of; it takes the place of the dead one, also when the server stops."""
    server = run(FORKED, restart_limit=5)
    server.wait_for("ready")
    before = find_fork_server(server)
    for number in (2, 3):
        os.kill(pid_of(server, name), signal.SIGKILL)
        server.wait_for(f"{name} start {number}")
        assert psutil.Process(pid_of(server, name)).ppid() == server.process.pid
    assert find_fork_server(server) == before
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    ends = [line.split()[0] for line in server.log if line.endswith(" end")]
    assert ends == ["http", "scheduler", "detokenizer", "device"]
    assert not server.orphans()


def test_a_forked_process_that_ends_for_another_s_failure_is_not_forked_again(run) -> None:
    server = run("http forked dies 3;scheduler forked;device", restart_limit=5)
    server.wait_for("ready")
    assert server.end() == 1
    assert "say http exited with status 3" in server.log
    assert "http start 2" not in server.log
    assert "device end" in server.log and not server.orphans()


def test_a_fork_server_that_has_died_is_started_again_when_a_process_is_to_be_forked(run) -> None:
    server = run(FORKED, restart_limit=5)
    server.wait_for("ready")
    find_fork_server(server).send_signal(signal.SIGKILL)
    server.wait_for("say fork server was killed by SIGKILL; it is started again when it is needed")
    os.kill(pid_of(server, "http"), signal.SIGKILL)
    server.wait_for("http start 2")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_kept_fork_server_is_started_again_before_it_is_needed(run, number: int) -> None:
    server = run(FORKED, restart_limit=5, kept=True)
    server.wait_for("ready")
    before = find_fork_server(server)
    before.send_signal(number)
    server.wait_for("say fork server was killed by SIGKILL; it is started again (restart 1)")
    assert "http start 2" not in server.log
    deadline = time.monotonic() + 10
    launcher = psutil.Process(server.process.pid)
    while before in (children := launcher.children()) or len(children) != 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid_of(server, "http"), signal.SIGKILL)
    server.wait_for("http start 2")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


def test_a_fork_server_that_dies_while_it_is_waited_for_is_started_again(run) -> None:
    server = run(FORKED, restart_limit=5)
    server.wait_for("ready")
    stopped = find_fork_server(server)
    stopped.send_signal(signal.SIGSTOP)
    os.kill(pid_of(server, "http"), signal.SIGKILL)
    server.wait_for("say http was killed by SIGKILL; it is started again (restart 1)")
    time.sleep(0.3)
    assert "http start 2" not in server.log
    stopped.send_signal(signal.SIGKILL)
    server.wait_for("http start 2")
    assert server.log.count("http start 2") == 1
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


def test_a_fork_server_that_stays_stopped_while_it_is_waited_for_is_replaced(run) -> None:
    server = run(FORKED, restart_limit=5)
    server.wait_for("ready")
    stopped = find_fork_server(server)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(2.5)  # nobody waits for it
    assert is_alive(stopped)
    began = time.monotonic()
    os.kill(pid_of(server, "http"), signal.SIGKILL)
    server.wait_for("http start 2")
    assert time.monotonic() - began > 1.5
    assert not is_alive(stopped)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert not server.orphans()


@pytest.mark.parametrize(("number", "expected"), [("SIGTERM", 0), ("SIGKILL", -signal.SIGKILL)])
def test_the_fork_server_ends_with_the_launcher(run, number: str, expected: int) -> None:
    server = run(FORKED, fork_server=(600.0, 0))
    server.wait_for("device start")
    deadline = time.monotonic() + 10
    while len(server.seen) < 2 and time.monotonic() < deadline:
        server.look()
    assert len(server.seen) == 2
    began = time.monotonic()
    server.process.send_signal(signal.Signals[number])
    assert server.end() == expected
    assert time.monotonic() - began < 10
    assert not server.orphans()


def test_what_is_forked_leaves_when_it_is_not_adopted(tmp_path: Path) -> None:
    """A forked process does not run when its parent is not the launcher, which is to end it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (tmp_path / "fork_server.py").write_text(FORK_SERVER)
    (tmp_path / "touch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    plan = [0, 0, {"http": [str(tmp_path / "touch.py")]}]
    argv = [sys.executable, str(tmp_path / "fork_server.py"), json.dumps(plan), "--launcher-fd"]
    with theirs:
        fd = theirs.fileno()
        server = subprocess.Popen([*argv, str(fd)], pass_fds=[fd])
    with ours:
        ours.settimeout(30)
        ours.send(json.dumps({"name": "http", "incarnation": 1}).encode())
        forked = psutil.Process(json.loads(ours.recv(4096))["pid"])
        deadline = time.monotonic() + 10
        while is_alive(forked):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.poll() is None
    assert server.wait(10) == 0
    assert not (tmp_path / "ran").exists()


GROUPED = "http;one grouped,two grouped"


def test_a_group_is_replaced_as_one(run) -> None:
    server = run(GROUPED, restart_limit=5)
    server.wait_for("ready")
    first = {name: pid_of(server, name) for name in ("one", "two")}
    os.kill(first["one"], signal.SIGKILL)
    for name in first:
        server.wait_for(f"{name} start 2")
    assert not any(psutil.pid_exists(pid) for pid in first.values())
    gone = [line.partition(": ")[2] for line in server.log if line.startswith("gone")]
    assert gone == ["one was killed by SIGKILL", "two cannot go on without one"]
    for name in first:  # both die at once, as such processes do
        with contextlib.suppress(ProcessLookupError):  # the launcher may have been faster
            os.kill(pid_of(server, name), signal.SIGKILL)
    for name in first:
        server.wait_for(f"{name} start 3")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert [line for line in server.log if line.startswith("http")] == ["http start", "http end"]
    assert not server.orphans()


def test_a_group_counts_as_one(run) -> None:
    server = run(GROUPED, restart_limit=2)
    server.wait_for("ready")
    for name, again in (("one", 2), ("two", 3)):
        os.kill(pid_of(server, name), signal.SIGKILL)
        server.wait_for(f"one start {again}")
        server.wait_for(f"two start {again}")
    os.kill(pid_of(server, "one"), signal.SIGKILL)
    assert server.end() == 1
    assert "lost None: one was killed by SIGKILL" in server.log
    assert not server.orphans()
