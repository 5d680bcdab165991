import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from trilobit.errors import OutputError
from trilobit.train.plots import plot_flips, plot_loss, plot_strengths, read_log
from trilobit.train.schedule import strength_schedule


def write_log(run: Path, losses: list[float], held: dict[int, float]) -> None:
    rows: list[dict[str, Any]] = [{"tokens": 100 * (i + 1), "cross_entropy": loss} for i, loss in enumerate(losses)]
    for index, value in held.items():
        rows[index]["heldout_nats"] = value
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def coloured(path: Path) -> int:
    """Pixels that are neither grey nor white: lines in a colour."""
    image = imread(path)[..., :3]
    assert image.shape[0] > 300 and image.shape[1] > 600
    return int((np.ptp(image, axis=-1) > 0.2).sum())


def test_a_loss_curve_is_drawn(tmp_path: Path) -> None:
    """loss.png shows held-out and original losses in colour, and more of them than an empty log would."""
    write_log(tmp_path, [5 - 0.1 * i for i in range(20)], {9: 4.5, 19: 3.5})
    path = plot_loss(tmp_path, 3.0)
    assert path == tmp_path / "loss.png"
    both = coloured(path)
    write_log(tmp_path, [5 - 0.1 * i for i in range(20)], {})
    assert both > coloured(plot_loss(tmp_path, 3.0)) > 0


@pytest.mark.parametrize("losses", [[3.0], [3.0, 3.0], [11.0, 4.0]])
def test_the_shortest_logs_are_drawn_too(losses: list[float], tmp_path: Path) -> None:
    """One row, or a loss that never moves from the original's, is a picture without a warning."""
    write_log(tmp_path, losses, {len(losses) - 1: 3.0})
    assert coloured(plot_loss(tmp_path, 3.0)) > 0
    assert len(read_log(tmp_path)) == len(losses)


def test_flips_are_drawn_layer_by_layer(tmp_path: Path) -> None:
    """flips.png has a line for each layer, over the evaluated rows alone."""
    counts = []
    for layers in (1, 3):
        rows = [{"step": i, "tokens": 100 * i} for i in range(1, 7)]
        for row in rows[1::2]:
            row["flips"] = [0.01 * (layer + 1) for layer in range(layers)]  # pyright: ignore
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts.append(coloured(plot_flips(tmp_path)))
    assert counts[1] > 1.5 * counts[0] > 100


@pytest.mark.parametrize("kind", ["layerwise", "layerwise-reverse", "global", "immediate", "never"])
def test_strengths_are_drawn_for_every_schedule(kind: Any, tmp_path: Path) -> None:
    """lambda.png has a visible line for each schedule, the layers of a layer-wise one apart."""
    one = coloured(plot_strengths(tmp_path, strength_schedule(kind, 1, 1000, 0.5, 0.0), 1000))
    three = coloured(plot_strengths(tmp_path, strength_schedule(kind, 3, 1000, 0.5, 0.0), 1000))
    assert one > 100
    if kind.startswith("layerwise"):
        assert three > 1.5 * one  # the same ramp three times narrower, three times, and apart


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that the disk refuses is an OutputError and no file (old code: a traceback and half a PNG)."""

    def full(figure: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    write_log(tmp_path, [3.0], {})
    with pytest.raises(OutputError, match=r"loss\.png: No space left on device\. Make room"):
        plot_loss(tmp_path, 3.0)
    assert not (tmp_path / "loss.png").exists()
