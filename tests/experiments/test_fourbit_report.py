import json
import sys
from pathlib import Path

import fourbit_report
import pytest

from trilobit.fourbit.evaluate import Cell


def test_the_page_shows_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/fourbit.md has the tables that experiments/fourbit_report.py makes of docs/data/fourbit."""
    monkeypatch.setattr(sys, "argv", ["fourbit_report.py", "--check"])
    fourbit_report.main()


def test_a_grid_becomes_a_record_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells, knobs and notes are kept, places are not; the table goes between its markers, and another page is noticed."""
    report = tmp_path / "out" / "report"
    (report / "protocols").mkdir(parents=True)
    (report / "protocols" / "abc.json").write_text(json.dumps({"weight_bits": 4, "calibration_data": "/home/me/train.gz"}))
    common = {"model": "/home/me/m", "protocol_sha256": "abc", "model_sha256": "d", "measurement_sha256": "e", "version": "9"}
    cells = [
        Cell(**common, column="original", bits="16-16-16", method="none", perplexity=20.0, tokens=1000),
        Cell(**common, column="RTN", bits="4-8-16", method="rtn", perplexity=30.0, seconds=2.0, applied=["a note"]),
    ]
    found = {"data": "/home/me/wiki.raw", "precision": "fp32", "cells": [vars(cell) for cell in cells], "protocols": {}}
    (report / "fourbit.json").write_text(json.dumps(found))
    (tmp_path / "fourbit.md").write_text("before\n<!-- small -->\nold\n<!-- /small -->\nafter\n")
    monkeypatch.setattr(fourbit_report, "DOCS", tmp_path)
    monkeypatch.setattr(fourbit_report, "RECORDS", tmp_path / "data")
    monkeypatch.setattr(sys, "argv", ["fourbit_report.py", "--check"])
    fourbit_report.main()  # there is no record yet
    monkeypatch.setattr(sys, "argv", ["fourbit_report.py", f"small={tmp_path / 'out'}"])
    fourbit_report.main()
    kept = (tmp_path / "data" / "small.json").read_text()
    assert "/home" not in kept and "train.gz" in kept
    page = (tmp_path / "fourbit.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert "| 4-8-16 | 30.0000 |" in page and "* RTN: a note" in page and "wiki.raw, 1,000 tokens" in page
    (tmp_path / "fourbit.md").write_text(page.replace("30.0000", "29.0000"))
    monkeypatch.setattr(sys, "argv", ["fourbit_report.py", "--check"])
    with pytest.raises(AssertionError, match="is not what"):
        fourbit_report.main()
