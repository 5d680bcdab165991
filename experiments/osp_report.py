"""docs/outlier_safe.md's tables, from the records of experiments/osp_ablation.py and experiments/embedded_pair.py alone.

    python experiments/osp_report.py [--check]

--check writes nothing and fails if a table is not the one that the records give.
"""

import argparse
from pathlib import Path

import embedded_pair
import osp_ablation

DOCS = Path(__file__).parents[1] / "docs"


def tables() -> dict[str, str]:
    """What stands between the markers of each name."""
    rows, rates = (osp_ablation.read_records(osp_ablation.RECORDS / study) for study in ("3m", "3m-rates"))
    return {
        "rows": osp_ablation.table(rows),
        "rates": osp_ablation.rates_table(rates),
        "pair": embedded_pair.table(embedded_pair.read_records()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = DOCS / "outlier_safe.md"
    text = shown = page.read_text(encoding="utf-8")
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + table + "\n" * bool(table) + end + rest.split(end)[1]
    if not arguments.check:
        page.write_text(text, encoding="utf-8")
    elif text != shown:
        raise SystemExit(f"{page.name} is not what the records give: run experiments/osp_report.py")


if __name__ == "__main__":
    main()
