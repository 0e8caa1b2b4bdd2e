import pytest
from crosspool.config.sizes import exact_size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 1024**3),
        ("512MiB", 512 * 1024**2),
        ("512 MiB", 512 * 1024**2),
        ("1.5GB", 1_500_000_000),
        ("64k", 64_000),
        ("64Ki", 65_536),
        ("7B", 7),
        ("4096", 4096),
        (4096, 4096),
        ("1TiB", 1024**4),
    ],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gigs", "1e9", "0", "0.5", "1,5GB", "2gib"])
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (4097, "4097"),
        (1536, "1536"),
        (3 << 29, "1536MiB"),
        (2 << 20, "2MiB"),
        (5 << 40, "5TiB"),
    ],
)
def test_exact_sizes_are_read_again(size: int, text: str) -> None:
    assert exact_size(size) == text
    assert size == 0 or parse_size(text) == size
