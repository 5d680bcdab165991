import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilobit.config.fields import format_count, parse_count

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


@given(st.integers(1, 10**20) | st.builds(lambda n, unit: n * unit, st.integers(1, 2000), st.sampled_from([*UNITS.values()])))
def test_counts_survive_printing(value: int) -> None:
    """What format_count writes, parse_count reads back, beyond 2⁵³ too."""
    assert parse_count(format_count(value)) == value


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from(["k", "K", "M", "m", "B", "b"]))
def test_decimals_are_exact(whole: int, thousandths: int, unit: str) -> None:
    """W.ddd with a unit is exactly that many (in floats 1.001k is 1000.9999999999999)."""
    expected = (whole * 1000 + thousandths) * UNITS[unit.upper() if unit not in "kK" else "k"] // 1000
    text = f"{whole}.{thousandths:03}{unit}"
    if expected:
        assert parse_count(text) == expected
    else:
        with pytest.raises(ValueError, match="not a whole number"):
            parse_count(text)


def test_spellings() -> None:
    """Units, decimals and thousands separators are understood, and short spellings are used."""
    spelled = {"12k": 12_000, "3M": 3_000_000, "1B": 10**9, " 1.5m ": 1_500_000, "1,048,576": 1 << 20, "65_536": 65_536}
    assert {text: parse_count(text) for text in spelled} == spelled
    assert [format_count(n) for n in (4096, 12_000, 3_000_000, 10**9)] == ["4096", "12k", "3M", "1B"]


@pytest.mark.parametrize(
    "text",
    ["", "k", "0", "0k", "-1", "+1", "1e6", "1.5", "0.5", "1.0005k", "1,5M", "1_0", ",5", "5.", "12kk", "1 000", "3T",
     "nan", "inf", "0x10", "٣", "many"],
)  # fmt: skip
def test_what_is_no_count_is_refused(text: str) -> None:
    """A text that is no whole number ≥ 1 is refused and quoted; `1,5M` is not taken for 15M."""
    with pytest.raises(ValueError, match="is not a ") as caught:
        parse_count(text)
    assert repr(text) in str(caught.value)
