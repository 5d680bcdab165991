"""docs/outlier_safe.md and the records it is made of."""

import sys
from pathlib import Path

import osp_report
import pytest


def test_the_page_shows_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/outlier_safe.md has the tables that experiments/osp_report.py makes of docs/data/osp and docs/data/embedded_pair."""
    monkeypatch.setattr(sys, "argv", ["osp_report.py", "--check"])
    osp_report.main()


def test_a_page_that_shows_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is written between its markers, and a changed number fails the check."""
    page = tmp_path / "outlier_safe.md"
    names = list(osp_report.tables())
    page.write_text("\n".join(f"before {name}\n<!-- {name} -->\nold\n<!-- /{name} -->" for name in names) + "\nafter\n")
    monkeypatch.setattr(osp_report, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["osp_report.py"])
    osp_report.main()
    written = page.read_text()
    assert "old" not in written and written.startswith("before rows\n") and written.endswith("\nafter\n")
    assert all(f"before {name}\n" in written for name in names)
    page.write_text(written.replace("Adam", "Adams", 1))
    monkeypatch.setattr(sys, "argv", ["osp_report.py", "--check"])
    with pytest.raises(SystemExit, match="osp_report"):
        osp_report.main()
