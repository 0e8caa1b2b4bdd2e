"""``crosspool compile`` as far as it goes without Triton."""

from __future__ import annotations

import importlib.util

import pytest
from crosspool.cli.main import main


def test_without_triton_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for words in (["--check", "kernels.tar.gz"], ["--capability", "90", "--model-path", "models"]):
        assert main(["compile", *words]) == 2
        assert "Triton is not installed" in capsys.readouterr().err


def test_the_help_shows_how_kernels_get_to_another_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["compile", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for words in ("--pack kernels.tar.gz", "--check kernels.tar.gz", "--unpack kernels.tar.gz"):
        assert words in shown
