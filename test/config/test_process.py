"""What every process of a deployment does."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from support.server import DEMO


def test_full_collections_leave_out_what_was_there() -> None:
    code = (
        "import gc, msgspec, zmq; from crosspool.config.process import freeze_heap;"
        "before = len(gc.get_objects()); loop = []; loop.append(loop); del loop;"
        "freeze_heap(); left = len(gc.get_objects());"
        "assert before > 10_000 and left < before / 100, (before, left);"
        "loop = []; loop.append(loop); del loop;"
        "assert gc.collect() == 1"
    )
    run_alone(code)


def test_full_collections_are_rare() -> None:
    run_alone(
        "import gc; from crosspool.config.process import freeze_heap; freeze_heap();"
        "begun = gc.get_stats(); kept = [[] for _ in range(10 * 10 * 700 * 3)];"
        "middle, full = (now['collections'] - was['collections']"
        "                for now, was in zip(gc.get_stats()[1:], begun[1:]));"
        "assert middle > 20 and not full, (middle, full)"
    )


def test_nothing_is_collected_while_something_is_imported() -> None:
    run_alone(
        "import gc; from crosspool.config.process import without_collections;"
        "begun = [now['collections'] for now in gc.get_stats()];"
        "keep = without_collections(); keep.__enter__();"
        "kept = [[] for _ in range(100_000)];"
        "assert [now['collections'] for now in gc.get_stats()] == begun;"
        "keep.__exit__(None, None, None);"
        "kept += [[] for _ in range(100_000)];"
        "assert gc.get_stats()[0]['collections'] > begun[0] + 10"
    )


def run_alone(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def limited(soft: int, hard: int, code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process that may open so many descriptors."""
    return subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_descriptors_are_allowed_up_to_the_hard_limit() -> None:
    code = (
        "import resource; from crosspool.config.process import allow_descriptors;"
        "allow_descriptors(3); print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for soft, hard in ((64, 1000), (1000, 1000), (1000, most)):
        assert limited(soft, hard, code).stdout == f"({min(hard, 65536)}, {hard})\n"
    assert limited(64, 176, code).stdout == "(176, 176)\n"
    assert "ulimit -n: 175 open files are allowed, but 176" in limited(64, 175, code).stderr


@pytest.mark.parametrize("most", [40, 64])
def test_too_few_descriptors_are_a_users_mistake(most: int) -> None:
    path = DEMO / "tiny-qwen3-moe"
    code = (
        "import sys; from crosspool.cli.main import run;"
        f"sys.exit(run('serve', ['--port', '0', '--model-path', {str(path)!r}]))"
    )
    done = limited(most, most, code)
    assert done.returncode == 2
    assert f"error: ulimit -n: {most} open files are allowed" in done.stderr
    assert "Traceback" not in done.stderr
