"""docs/fourbit.md's tables of whole models, from the records of `trilobit quantize --grid osp` alone.

    python experiments/fourbit_report.py [NAME=OUT …] [--check]

NAME=OUT keeps what a finished grid found as docs/data/fourbit/NAME.json (of several models NAME-MODEL.json each), places
of texts and models left out. Then the table between the markers of each record in docs/fourbit.md is written. --check writes
nothing and fails if a table is not the one that the records give.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from pages import with_table

from trilobit.fourbit.evaluate import ORIGINAL, Cell
from trilobit.fourbit.result import footnotes, grid_rows, markdown, task_rows
from trilobit.measure.scores import TaskScore

DOCS = Path(__file__).parents[1] / "docs"
RECORDS = DOCS / "data" / "fourbit"
KEPT = [field.name for field in fields(Cell) if field.name != "model"]


def keep(name: str, out: Path) -> None:
    """The record of a finished grid."""
    report = json.loads((out / "report" / "fourbit.json").read_text())
    models = dict.fromkeys(cell["model"] for cell in report["cells"])
    cells = {model: [{k: c[k] for k in KEPT} for c in report["cells"] if c["model"] == model] for model in models}
    protocols = {}
    for file in sorted((out / "report" / "protocols").glob("*.json")):
        knobs = json.loads(file.read_text())
        source = knobs["calibration_data"]
        protocols[file.stem] = knobs | {"calibration_data": source and Path(source).name}
    RECORDS.mkdir(parents=True, exist_ok=True)
    record = {"data": Path(report["data"]).name, "precision": report["precision"], "protocols": protocols}
    for model, rows in cells.items():
        suffix = f"-{Path(model).name}" if len(cells) > 1 else ""
        (RECORDS / f"{name}{suffix}.json").write_text(json.dumps(record | {"cells": rows}, indent=1) + "\n")


def section(record: dict[str, Any]) -> str:
    """Perplexities by bits and column; below it what the protocols came to."""
    cells = [Cell(model="", **c | {"tasks": [TaskScore(**s) for s in c.get("tasks") or []]}) for c in record["cells"]]
    original = next(cell for cell in cells if cell.column == ORIGINAL)
    notes = [f"* {note}" for note in footnotes(cells)]
    notes.append(f"* {record['data']}, {original.tokens:,} tokens, {record['precision']}; `trilobit` {original.version}")
    asked = task_rows(cells)
    return "\n".join([markdown(grid_rows(cells)), "", *([markdown(asked), ""] if asked else []), *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grids", nargs="*", metavar="NAME=OUT")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for grid in arguments.grids:
        name, _, out = grid.partition("=")
        keep(name, Path(out))
    page = DOCS / "fourbit.md"
    text = shown = page.read_text()
    for path in sorted(RECORDS.glob("*.json")):
        text = with_table(text, path.stem, section(json.loads(path.read_text())))
    if arguments.check:
        assert text == shown, f"{page} is not what {RECORDS} gives: run experiments/fourbit_report.py"
    else:
        page.write_text(text)


if __name__ == "__main__":
    main()
