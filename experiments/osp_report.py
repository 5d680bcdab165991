"""docs/outlier_safe.md's tables and plot, from the records of experiments/osp_ablation.py and experiments/embedded_pair.py.

    python experiments/osp_report.py [--check]

The plot, docs/outlier_safe.png: excess kurtosis of the residual stream while each row of the ablation is trained.
--check writes nothing and fails if a table is not the one that the records give.
"""

import argparse
from pathlib import Path

import embedded_pair
import osp_ablation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from osp_ablation import ROWS, Records, read_records
from pages import with_table

from trilobit.train.plots import ACCENT, INK, MUTED, SECOND

DOCS = Path(__file__).parents[1] / "docs"
STYLES = {
    "adam": (INK, "-"), "muon-only": (SECOND, ":"), "muon": (SECOND, "-"), "ssnorm": (SECOND, "--"), "embproj": (ACCENT, "--"),
    "osp": (ACCENT, "-"),
}  # fmt: skip


def tables() -> dict[str, str]:
    """What stands between the markers of each name."""
    rows, rates = (read_records(osp_ablation.RECORDS / study) for study in ("3m", "3m-rates"))
    return {
        "rows": osp_ablation.table(rows),
        "rates": osp_ablation.rates_table(rates),
        "pair": embedded_pair.table(embedded_pair.read_records()),
    }


def plot_growth(records: Records, axes: Axes) -> None:
    """Mean over layers of the residual stream's excess kurtosis against tokens, each row at its best rate."""
    for row, name in ROWS.items():
        if (record := osp_ablation.best(records, row)) is not None:
            color, style = STYLES[row]
            tokens = [tokens / 1e6 for tokens, _, _ in record["curve"]]
            means = [sum(sites["residual"]) / len(sites["residual"]) for _, _, sites in record["curve"]]
            axes.plot(tokens, means, color=color, linestyle=style, linewidth=1.6, label=name)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set(xlabel="tokens, millions", ylabel="excess kurtosis of the residual stream")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = DOCS / "outlier_safe.md"
    text = shown = page.read_text(encoding="utf-8")
    for name, table in tables().items():
        text = with_table(text, name, table)
    if arguments.check:
        if text != shown:
            raise SystemExit(f"{page.name} is not what the records give: run experiments/osp_report.py")
        return
    page.write_text(text, encoding="utf-8")
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    plot_growth(read_records(osp_ablation.RECORDS / "3m"), figure.add_subplot())
    figure.savefig(DOCS / "outlier_safe.png", dpi=120)


if __name__ == "__main__":
    main()
