"""Models whose folders say the same of their tokenizers share one, and see nothing of it."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
from crosspool.frontend import shared_tokenizers
from crosspool.frontend.shared_tokenizers import get_tokenizer
from sglang.srt.utils import hf_transformers_utils
from support.server import DEMO

TEXT = "def f(x): return [x for x in range(10)]  # Grüße"
FILES = ("chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the same content."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in FILES:
            shutil.copy(DEMO / "tiny-qwen3-moe" / file, tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def test_equal_folders_share_what_encodes_and_decodes(folders: tuple[Path, Path]) -> None:
    one, two = (get_tokenizer(str(folder)) for folder in folders)
    assert one.backend_tokenizer is two.backend_tokenizer
    sglangs = hf_transformers_utils.get_tokenizer(str(folders[1]))
    ids = sglangs.encode(TEXT)
    assert two.encode(TEXT) == ids
    assert two.decode(ids) == sglangs.decode(ids)
    assert two.eos_token_id == sglangs.eos_token_id
    assert two.name_or_path == sglangs.name_or_path == str(folders[1])
    message = [{"role": "user", "content": "hello"}]
    assert two.apply_chat_template(message) == sglangs.apply_chat_template(message)


def test_attributes_are_each_ones_own(folders: tuple[Path, Path]) -> None:
    one, two = (get_tokenizer(str(folder)) for folder in folders)
    before = two.chat_template, two.pad_token
    one.chat_template = "{{ messages[0]['content'] }}"
    one.pad_token = one.eos_token
    assert (two.chat_template, two.pad_token) == before


@pytest.mark.parametrize("file", FILES)
def test_another_file_is_another_tokenizer(folders: tuple[Path, Path], file: str) -> None:
    path = folders[1] / file
    path.write_text(path.read_text() + "\n")
    one, two = (get_tokenizer(str(folder)) for folder in folders)
    assert one.backend_tokenizer is not two.backend_tokenizer


def test_other_arguments_are_another_tokenizer(folders: tuple[Path, Path]) -> None:
    one = get_tokenizer(str(folders[0]), trust_remote_code=False)
    two = get_tokenizer(str(folders[1]), trust_remote_code=True)
    assert one.backend_tokenizer is not two.backend_tokenizer


def test_whoever_is_left_goes_on(folders: tuple[Path, Path]) -> None:
    one, two = (get_tokenizer(str(folder)) for folder in folders)
    backend = two.backend_tokenizer
    del one
    gc.collect()
    assert get_tokenizer(str(folders[0])).backend_tokenizer is backend


def test_nothing_is_kept_of_tokenizers_that_are_gone(folders: tuple[Path, Path]) -> None:
    gc.collect()
    before = len(shared_tokenizers._tokenizers)
    tokenizers = [get_tokenizer(str(folder)) for folder in folders]
    assert len(shared_tokenizers._tokenizers) <= before + 1
    (content,) = (
        key for key, known in shared_tokenizers._tokenizers.items() if tokenizers[0] in known
    )
    del tokenizers
    gc.collect()
    (folders[0] / "config.json").write_text((DEMO / "tiny-deepseek-v2" / "config.json").read_text())
    other = get_tokenizer(str(folders[0]))
    assert content not in shared_tokenizers._tokenizers
    assert other is not None
