"""docs/outlier_safe.md's tables and plot, from the records of experiments/osp_ablation.py and experiments/embedded_pair.py, and
from what `trilobit outliers` found in SmolLM2-135M.

    python experiments/osp_report.py [--check]

The plot, docs/outlier_safe.png: excess kurtosis of the residual stream while each row of the ablation is trained, and what four
bits cost it in the end.
--check writes nothing and fails if a table is not the one that the records give.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import embedded_pair
import osp_ablation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from osp_ablation import ROWS, Records, read_records
from pages import with_table

from trilobit.train.plots import ACCENT, INK, MUTED, SECOND

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "data"
STYLES = {
    "adam": (INK, "-"), "muon-only": (SECOND, ":"), "muon": (SECOND, "-"), "ssnorm": (SECOND, "--"), "embproj": (ACCENT, "--"),
    "osp": (ACCENT, "-"),
}  # fmt: skip


def tables() -> dict[str, str]:
    """What stands between the markers of each name."""
    rows, other, rates = (read_records(osp_ablation.RECORDS / study) for study in ("3m", "3m-seed-1", "3m-rates"))
    return {
        "rows": osp_ablation.table(rows),
        "parts": osp_ablation.parts_table(rows),
        "own": osp_ablation.rates_table(rows),
        "seeds": osp_ablation.seeds_table([rows, other]),
        "rates": osp_ablation.rates_table(rates),
        "pair": embedded_pair.table(embedded_pair.read_records()),
        "ordinary": ordinary(json.loads((DATA / "outliers_smollm2.json").read_text())),
    }


def ordinary(found: dict[str, Any]) -> str:
    """What `trilobit outliers` says of a model. found: its JSON."""
    whole = found["contextual"]
    stream = [row for row in whole["sites"] if row["site"] == "residual"]
    shown = {"excess kurtosis of the residual stream, contextual": f"{whole['excess_kurtosis']:.0f}"}
    shown["… at the first position"] = f"{whole['first_excess_kurtosis']:.0f}"
    shown["excess kurtosis, osp"] = f"{found['osp']['excess_kurtosis']:.0f}"
    for site, name in (("residual", "of the residual stream"), ("mlp-output", "of what down_proj reads")):
        for where, place in (("later", ""), ("first", ", at the first position")):
            top = max((row for row in whole["sites"] if row["site"] == site), key=lambda row: row[where]["max_to_median"])
            ratio, channel = top[where]["max_to_median"], top[where]["channels"][0]["channel"]
            shown[f"largest activation over the median one {name}{place}"] = (
                f"{ratio:,.0f} (layer {top['layer']}, channel {channel})"
            )
    channels = [row["later"]["channels"][0]["channel"] for row in stream]
    most = max(set(channels), key=channels.count)
    shown[f"layers whose residual stream is largest in channel {most}"] = f"{channels.count(most)} of {len(channels)}"
    top = max(stream, key=lambda row: row["later"]["channels"][0]["energy_share"])["later"]["channels"][0]
    layer = next(row["layer"] for row in stream if row["later"]["channels"][0] is top)
    shown[f"of all squared activations in channel {top['channel']}, after layer {layer}"] = f"{top['energy_share']:.0%}"
    shares = whole["sink_share"]
    shown["attention that goes to the first position, by layer"] = f"{min(shares):.0%} to {max(shares):.0%}"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())])


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


def plot_costs(records: Records, axes: Axes) -> None:
    """Nats that W4A4KV4 costs each row at its best rate, without and with the Hadamard in front of the MLP's last linear."""
    rows = [(name, found) for row, name in ROWS.items() if (found := osp_ablation.best(records, row)) is not None]
    for position, (_, r) in enumerate(reversed(rows)):
        plain, turned = (r[key] - r["w16a16kv16"] for key in ("w4a4kv4", "w4a4kv4_hadamard"))
        color = STYLES[r["row"]][0]
        axes.barh(position, plain, 0.62, color=color, alpha=0.35)
        axes.barh(position, turned, 0.62, color=color)
    axes.set_yticks(range(len(rows)), [name.split(" (")[0] for name, _ in reversed(rows)], fontsize=8)
    axes.set(xlabel="nats lost at W4A4KV4\n(dark: with FFN Hadamard)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


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
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    growth, costs = figure.subplots(1, 2, width_ratios=(3, 2))
    records = read_records(osp_ablation.RECORDS / "3m")
    plot_growth(records, growth)
    plot_costs(records, costs)
    figure.savefig(DOCS / "outlier_safe.png", dpi=120)


if __name__ == "__main__":
    main()
