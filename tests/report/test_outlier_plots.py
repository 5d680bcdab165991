"""Surfaces of activations: no outlier is lost between pixels."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread

from trilobit.measure.contextual import Channel, Positions, SiteOutliers
from trilobit.report.outlier_plots import PIXELS, _pooled, plot_surface


def test_surfaces_keep_their_largest() -> None:
    """However many activations share a pixel, the largest shows; what has fewer than there are pixels is left alone."""
    values = np.random.default_rng(0).random((PIXELS[0] * 2 + 7, PIXELS[1] + 1))
    values[123, 45] = 9
    pooled = _pooled(values)
    assert pooled.shape == PIXELS
    assert (pooled == 9).sum() == 1
    assert np.isin(pooled, values).all()
    assert np.array_equal(_pooled(values[:5, :6]), values[:5, :6])


def test_surfaces_of_any_scale_are_drawn(tmp_path: Path) -> None:
    """All zeros, sequences of two tokens, and activations near the end of fp32 are pictures without a warning."""
    channels = [Channel(channel, 1.0, 0.1, "a", 0, 1) for channel in (3, 4, 30)]
    part = Positions(1, 0.0, 1.0, None, channels)
    row = SiteOutliers(0, "residual", "layers.0", 32, part, part)
    for drawn in (torch.zeros(2, 32), torch.rand(2, 32), torch.rand(700, 32) * 1e30):
        plot_surface(drawn, row, tmp_path / "surface.png")
        assert imread(tmp_path / "surface.png").shape[0] > 300
