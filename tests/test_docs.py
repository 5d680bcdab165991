"""The drawings in docs/formats.md are what the code does: their examples are run."""

import doctest
from pathlib import Path

FORMATS = Path(__file__).parent.parent / "docs" / "formats.md"


def failures(text: str) -> tuple[int, int]:
    """How many of a text's examples fail, and how many there are."""
    test = doctest.DocTestParser().get_doctest(text, {}, FORMATS.name, str(FORMATS), 0)
    found = doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None)
    return found.failed, found.attempted


def test_the_drawn_bits_are_the_packed_bits() -> None:
    """Every layout's example prints the bits that are drawn, and a drawing with a wrong bit would be noticed."""
    text = FORMATS.read_text(encoding="utf-8")
    failed, attempted = failures(text)
    assert failed == 0
    assert attempted >= 30
    for layout in ("Bitnet", "TwoBit", "PanelTwoBit", "PanelBase3", "TQ1_0", "TQ2_0", "Q2_0"):
        assert f"{layout}.pack(" in text
    assert failures(text.replace("    01  10  01  00\n", "    01  10  00  01\n", 1))[0] == 1
