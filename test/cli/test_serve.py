"""What ``crosspool serve`` makes of its words before anything starts."""

from __future__ import annotations

import pytest
from crosspool.cli.serve import read_options
from crosspool.config.errors import ConfigError

CANARY = "canary-97531"


@pytest.mark.parametrize("words", [["--api-key", CANARY], [f"--api-key={CANARY}"]])
def test_a_key_beside_a_file_is_refused_and_not_told(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--api-key: beside --config ") as error:
        read_options(["--config", "deployment.yaml", *words], "crosspool serve")
    assert CANARY not in str(error.value)
