import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.errors import BudgetError
from millpond.memory.budget import Budget, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 << 20),
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("0.1kB", 100),
        ("4096", 4096),
        (" 12 kib ", 12 << 10),
        ("1_000_000", 1_000_000),
        (".5MB", 500_000),
        (77, 77),
    ],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size == Budget(text)


@pytest.mark.parametrize(
    "text", ["", "MiB", "64 Mib/s", "-5", "1e9", "0", 0, -1, "0.2", True, None, 1.5, "64 MiBs", "nan", "٣٢ MiB"]
)
def test_what_is_not_a_size_is_refused_in_one_line(text: object) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_bytes(text)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@given(st.integers(1, 1 << 50))
def test_integers_pass_and_print(size: int) -> None:
    assert parse_bytes(size) == parse_bytes(str(size)) == size
    number, unit = format_bytes(size).split()
    assert (
        abs(float(number) - size / {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit])
        <= 0.005 + 1e-9
    )


def test_sizes_as_people_read_them() -> None:
    sizes = [0, 1, 1023, 1024, 1025, 5000, 10**6, 1 << 20, 3 << 29, 1 << 40, 5 << 50, -2048]
    assert [format_bytes(size) for size in sizes] == [
        "0 B",
        "1 B",
        "1023 B",
        "1.00 KiB",
        "1.00 KiB",
        "4.88 KiB",
        "976.56 KiB",
        "1.00 MiB",
        "1.50 GiB",
        "1.00 TiB",
        "5120.00 TiB",
        "-2.00 KiB",
    ]
