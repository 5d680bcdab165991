"""Counts in place of values: medians and histograms within their bins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilobit.measure.stream import Stream, histogram


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=40))
def test_medians_are_within_their_bin(values: list[float]) -> None:
    """Over two hundred binary orders of magnitude the median from counts is off by less than 0.8 %."""
    stream = Stream(len(values), torch.device("cpu"))
    stream.add(torch.tensor([values]), torch.tensor([0]))
    expected = max(values) / torch.tensor(values).median().item()
    assert stream.max_to_median() == pytest.approx(expected, rel=0.008)


def test_zeros_have_no_median() -> None:
    """Where half of the activations are zero (after a ReLU), max / median is None, and all zeros are kurtosis 0."""
    stream = Stream(4, torch.device("cpu"))
    stream.add(torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), torch.arange(2))
    assert stream.max_to_median() is None
    assert stream.mean_kurtosis() == pytest.approx((0.76953125 / 0.6875**2 - 3) / 2)
    counts = histogram(stream.ratios)
    assert (counts.below, sum(counts.fractions)) == (0.75, 0.25)


def test_histograms_are_of_the_sizes_over_their_rms() -> None:
    """Edges are quarters of octaves; fractions count |x|/rms of each token exactly, and none is lost."""
    x = torch.randn(300, 64) * torch.rand(300, 1).exp2_()
    stream = Stream(64, torch.device("cpu"))
    stream.add(x, torch.arange(300))
    result = histogram(stream.ratios)
    ratios = (x / x.double().square().mean(1, keepdim=True).sqrt().float()).abs()
    expected = torch.histogram(ratios, bins=torch.tensor(result.edges)).hist / ratios.numel()
    assert result.fractions == pytest.approx(expected.tolist(), abs=1e-6)
    assert sum(result.fractions) + result.below == pytest.approx(1)
    assert result.edges[:5] == [2**-8 * (1 + quarter / 4) for quarter in range(4)] + [2**-7]
