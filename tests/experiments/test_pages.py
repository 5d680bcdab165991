"""Tables go between their markers, and a page without a place for one is noticed."""

import pytest
from pages import with_table

PAGE = "before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n"


def test_a_table_replaces_what_was_there() -> None:
    """Its own place alone is changed, however often, and an empty table leaves an empty place."""
    page = with_table(PAGE, "a", "| new |")
    assert page == PAGE.replace("old", "| new |") == with_table(page, "a", "| new |")
    assert with_table(page, "a", "") == PAGE.replace("old\n", "")
    assert with_table(PAGE, "b", "x\ny") == PAGE.replace("<!-- b -->\n", "<!-- b -->\nx\ny\n")


@pytest.mark.parametrize("page", ["", "<!-- a -->\n", "<!-- /a -->\n<!-- a -->\n"])
def test_a_page_without_its_place_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="no place for a"):
        with_table(page, "a", "x")
