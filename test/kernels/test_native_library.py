"""Loading of the native library, and the errors of a source tree without it."""

import errno

import crosspool.kernels
import pytest
from crosspool.kernels import native


def test_a_missing_library_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(crosspool.kernels, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"is not in .*pip install -e"):
        native.library.__wrapped__()


def test_a_broken_library_says_how_to_build_it(tmp_path, monkeypatch):
    (tmp_path / native.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(crosspool.kernels, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"cannot be loaded .*pip install -e"):
        native.library.__wrapped__()


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(ImportError, match="has version"):
        native.library.__wrapped__()


def test_errors_of_the_system_keep_their_number():
    with pytest.raises(OSError, match="address space") as error:
        native.reserve_range(1 << 60)
    assert error.value.errno == errno.ENOMEM
    with pytest.raises(OSError, match="Invalid argument") as error:
        native.reserve_range(native.HUGE_PAGE + 4096)
    assert error.value.errno == errno.EINVAL


def test_ranges_are_aligned():
    for nbytes in (native.HUGE_PAGE, 3 * native.HUGE_PAGE):
        address = native.reserve_range(nbytes)
        assert address % native.HUGE_PAGE == 0
        native.release(address, nbytes)
