"""Pictures of a run, from its log alone: loss, each layer's λ, and each layer's flips of codes, against tokens."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trilobit.errors import OutputError
from trilobit.train.schedule import StrengthSchedule

INK, MUTED, ACCENT, SECOND = "#1a1a1a", "#a0a0a0", "#c4472b", "#2b6cb0"


def read_log(run: Path) -> list[dict[str, Any]]:
    """Rows of log.jsonl, in order."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def plot_loss(run: Path, base_nats: float | None = None) -> Path:
    """loss.png: training loss (thin), held-out loss (dots), the original model's held-out loss (dashed, if there is one)."""
    rows = read_log(run)
    figure, axes = _figure("nats per token")
    training = [(row["tokens"], row["cross_entropy"]) for row in rows]
    held = [(row["tokens"], row["heldout_nats"]) for row in rows if "heldout_nats" in row]
    axes.plot(*zip(*training, strict=True), color=MUTED, linewidth=0.8, label="training")
    if held:
        axes.plot(*zip(*held, strict=True), color=ACCENT, marker="o", markersize=4, linewidth=1.6, label="held out")
    shown = [value for _, value in [*training[len(training) // 20 :], *held]]  # the first steps would flatten the rest
    if base_nats is not None:
        axes.axhline(base_nats, color=SECOND, linestyle="--", linewidth=1.2, label="original model, held out")
        shown.append(base_nats)
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.legend(frameon=False)
    return _save(figure, run / "loss.png")


def plot_strengths(run: Path, schedule: StrengthSchedule, max_tokens: int) -> Path:
    """lambda.png: λ of every layer's weights over the run, first layer light, last layer dark."""
    figure, axes = _figure("λ of weights")
    points = sorted({0.0, float(max_tokens), *schedule.starts, *(schedule.ends or ())})
    points = [point for point in points if point <= max_tokens]
    values = [schedule.at(point) for point in points]
    _plot_layers(axes, points, values)
    axes.set_ylim(-0.03, 1.03)
    return _save(figure, run / "lambda.png")


def plot_flips(run: Path) -> Path:
    """flips.png: the share of each layer's codes that one step changes, over the run, first layer light, last layer dark."""
    figure, axes = _figure("codes changed by one step")
    rows = [row for row in read_log(run) if "flips" in row]
    _plot_layers(axes, [row["tokens"] for row in rows], [row["flips"] for row in rows])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2%}")
    return _save(figure, run / "flips.png")


def plot_kurtosis(run: Path) -> Path:
    """kurtosis.png: excess kurtosis of what each layer passes on and of what its last linear reads, over the run."""
    figure, axes = _figure("excess kurtosis")
    rows = [row for row in read_log(run) if "kurtosis" in row]
    for site, color, label in (("residual", ACCENT, "residual stream"), ("mlp-output", SECOND, "what down_proj reads")):
        values = [(row["tokens"], row["kurtosis"].get(site)) for row in rows]
        points = [(tokens, layers) for tokens, layers in values if layers]
        for layer in range(len(points[0][1]) if points else 0):
            axes.plot([t for t, _ in points], [v[layer] for _, v in points], color=color, linewidth=0.7, alpha=0.4)
        means = [sum(layers) / len(layers) for _, layers in points]
        axes.plot([t for t, _ in points], means, color=color, linewidth=1.8, label=label)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.legend(frameon=False)
    axes.set_title("mean over layers (thick), each layer (thin)", fontsize=9, color=INK, loc="left")
    return _save(figure, run / "kurtosis.png")


def _plot_layers(axes: Axes, tokens: list[float], values: list[list[float]]) -> None:
    """values: one list over layers for each of `tokens`."""
    layers = len(values[0])
    for layer in range(layers):
        light = (layers - 1 - layer) / max(layers - 1, 1)
        color = (0.77 + 0.13 * light, 0.28 + 0.36 * light, 0.17 + 0.44 * light)
        axes.plot(tokens, [value[layer] for value in values], color=color, linewidth=1.4)
    axes.set_title(f"{layers} layers, first (light) to last (dark)", fontsize=9, color=INK, loc="left")


def _figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    return figure, axes


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _save(figure: Figure, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Make room and continue with --resume.") from error
    return path
