"""A picture of a table at 4 bits: perplexity of every cell, lower is better, a panel for each model."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from trilobit.fourbit.evaluate import ORIGINAL, Cell
from trilobit.train.plots import ACCENT, INK, MUTED, SECOND

COLORS = (ACCENT, "#e79b7f", "#8fb8e3", SECOND, "#3a7a38")


def plot_perplexity(cells: list[Cell], path: Path) -> None:
    """Bits across, a line for each column, the original dashed; the axis is logarithmic because what breaks, breaks far."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    figure = Figure(figsize=(2.2 + 4.4 * len(models), 3.8), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        own = [cell for cell in cells if cell.model == model and cell.perplexity is not None]
        bits = list(dict.fromkeys(cell.bits for cell in own if cell.column != ORIGINAL))
        columns = list(dict.fromkeys(cell.column for cell in own if cell.column != ORIGINAL))
        for index, column in enumerate(columns):
            points = [(bits.index(c.bits), c.perplexity) for c in own if c.column == column]
            axes.plot(*zip(*points, strict=True), color=COLORS[index % len(COLORS)], marker="o", linewidth=1.6, label=column)
        for cell in own:
            if cell.column == ORIGINAL:
                axes.axhline(cell.perplexity, color=MUTED, linestyle="--", linewidth=1.2, label=ORIGINAL)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(bits)), bits)
        axes.set_xlabel("bits of weights-activations-KV cache")
        axes.set_title(model, fontsize=9, color=INK, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panels[0].set_ylabel("perplexity")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
