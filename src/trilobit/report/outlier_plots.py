"""Pictures of a model's outliers: by depth, by size, and the activations themselves.

Sites keep their colours everywhere: the residual stream red, attention blue, MLP green, inputs light and outputs dark.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from trilobit.measure.contextual import Contextual, SiteOutliers
from trilobit.measure.kurtosis import OspKurtosis
from trilobit.measure.probes import SITES, SiteName
from trilobit.train.plots import ACCENT, INK, MUTED, SECOND

COLORS: dict[SiteName, str] = {
    "residual": ACCENT, "attention-input": "#8fb8e3", "attention-output": SECOND, "mlp-input": "#a5cf94",
    "mlp-output": "#3a7a38", "final-norm": INK,
}  # fmt: skip
HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#f6e3da", "#e79b7f", ACCENT, "#3d0d05"])
PIXELS = (240, 320)  # of a surface, at most: channels, tokens
NAMED = 8  # channels of a surface, at most
Value = Callable[[SiteOutliers], float | None]


def plot_kurtosis(result: Contextual, path: Path) -> None:
    """Excess kurtosis by layer, a line for each site; the residual stream's at the first position dashed."""
    figure, axes = _figure("layer", "excess kurtosis")
    _by_layer(axes, result, lambda row: row.later.excess_kurtosis, lambda row: row.first.excess_kurtosis)
    axes.set_yscale("symlog", linthresh=1, linscale=0.4)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    _save(figure, path)


def plot_ratios(result: Contextual, path: Path) -> None:
    """max |x| / median |x| by layer, as plot_kurtosis."""
    figure, axes = _figure("layer", "max |x| / median |x|")
    _by_layer(axes, result, lambda row: row.later.max_to_median, lambda row: row.first.max_to_median)
    axes.set_yscale("log")
    _save(figure, path)


def _by_layer(axes: Axes, result: Contextual, later: Value, first: Value) -> None:
    layers = sorted({row.layer for row in result.sites if row.layer is not None})
    for site in SITES:
        rows = [result.at(layer, site) for layer in layers]
        if any(row is not None for row in rows):
            _line(axes, layers, [row and later(row) for row in rows], site, label=site)
    rows = [result.at(layer, "residual") for layer in layers]
    _line(axes, layers, [row and first(row) for row in rows], "residual", label="residual, first position", linestyle="--")
    if (last := result.at(None, "final-norm")) is not None:
        _line(axes, [layers[-1] + 1], [later(last)], "final-norm", label="final-norm", linestyle="none")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _line(axes: Axes, layers: list[int], values: list[float | None], site: SiteName, **style: Any) -> None:
    heights = [math.nan if value is None else value for value in values]
    axes.plot(
        layers, heights, color=COLORS[site], linewidth=2 if site == "residual" else 1.4, marker="o", markersize=3, **style
    )


def plot_histograms(result: Contextual, path: Path) -> None:
    """Density of |x|/rms by site on logarithmic axes, beside the Gaussian's √(2/π)·exp(−x²/2)."""
    figure, axes = _figure("|x| / rms of the token", "density")
    smallest = 1.0
    for site in SITES:
        if site in result.histograms:
            edges, fractions = np.array(result.histograms[site].edges), np.array(result.histograms[site].fractions)
            density = fractions / np.diff(edges)
            smallest = min(smallest, density[density > 0].min())
            density[density == 0] = np.nan
            middle, width = np.sqrt(edges[:-1] * edges[1:]), 2 if site == "residual" else 1.4
            axes.plot(middle, density, color=COLORS[site], linewidth=width, label=site)
    x = np.geomspace(2**-8, 8, 200)
    axes.plot(x, math.sqrt(2 / math.pi) * np.exp(-(x**2) / 2), color=MUTED, linestyle="--", linewidth=1.4, label="Gaussian")
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(left=2**-5)
    axes.set_ylim(bottom=smallest / 2)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_states(result: OspKurtosis, path: Path) -> None:
    """The authors' excess kurtosis by hidden state: embeddings first, after the final norm last."""
    figure, axes = _figure("hidden state: embeddings, then after each layer (the last normed)", "excess kurtosis (osp)")
    axes.plot(range(len(result.states)), result.states, color=ACCENT, linewidth=2, marker="o", markersize=3)
    axes.set_yscale("symlog", linthresh=1, linscale=0.4)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def plot_surface(values: Tensor, row: SiteOutliers, path: Path) -> None:
    """|x| [T, W] of one sequence as channels × tokens: white up to the median, darkest at the largest after the first
    position. Above, the largest of each token; right, of each channel after the first position, the leading ones named.
    Several to a pixel: the largest shows."""
    magnitudes = values.numpy().T
    channels, tokens = magnitudes.shape
    by_channel = magnitudes[:, 1:].max(1)
    top = max(float(by_channel.max()), 1e-30)
    low = min(max(float(np.median(magnitudes)), top * 1e-4), top / 2)
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[5, 1.2], height_ratios=[1, 4])
    axes = figure.add_subplot(grid[1, 0])
    image = axes.imshow(
        _pooled(magnitudes), cmap=HEAT, norm=LogNorm(low, top, clip=True), aspect="auto", interpolation="nearest",
        origin="lower", extent=(-0.5, tokens - 0.5, -0.5, channels - 0.5),
    )  # fmt: skip
    above, right = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    right.hlines(np.arange(channels), 0, by_channel, color=INK, linewidth=0.6)
    axes.set(xlabel="position", ylabel="channel")
    by_token = magnitudes.max(0)
    massive = by_token.max() > 20 * np.median(by_token)
    above.set(ylabel="max |x|", yscale="log" if massive else "linear", title=_title(row))
    above.plot(by_token, color=INK, linewidth=0.9)
    right.set(xlabel="max |x|", xlim=(0, 1.05 * top))
    above.tick_params(labelbottom=False)
    right.tick_params(labelleft=False)
    named: list[int] = []
    for channel in by_channel.argsort()[::-1][:NAMED].tolist():
        if by_channel[channel] > 0 and all(abs(channel - other) > 0.04 * channels for other in named):  # else the names overlap
            named.append(channel)
            right.annotate(
                str(channel), (1, channel), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=8, color=ACCENT, annotation_clip=False,
            )  # fmt: skip
    for panel in (above, right):
        panel.spines[["top", "right"]].set_visible(False)
    ticks = LogLocator(subs=(1, 3))
    bar = figure.colorbar(image, ax=[above, axes, right], fraction=0.025, aspect=35, pad=0.01, label="|x|", ticks=ticks)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.ax.minorticks_off()
    _save(figure, path)


def _title(row: SiteOutliers) -> str:
    return row.site if row.layer is None else f"{row.site}, layer {row.layer}"


def _pooled(values: np.ndarray) -> np.ndarray:
    """The largest of each cell of a grid of at most PIXELS cells over `values`."""
    for axis, most in enumerate(PIXELS):
        size = values.shape[axis]
        starts = np.unique(np.arange(min(size, most)) * size // min(size, most))
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values


def _figure(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
