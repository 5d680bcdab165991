"""Round to nearest against its definition in float64."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit import naive
from trilobit.fourbit.protocol import PRESETS, Protocol
from trilobit.fourbit.rtn import Grid, Quantizer, round_to_nearest, round_weight, weight_grid, weight_scales

OSP = PRESETS["osp"]


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes, a tenth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape, generator=generator))
    return x * (torch.rand(*shape, generator=generator) > 0.1)


@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([1.0, 0.9, 0.5]), st.booleans(), st.integers(1, 3), st.integers(1, 9),
    st.integers(0, 99),
)  # fmt: skip
def test_activations_are_the_definition(
    bits: int, symmetric: bool, clip: float, inside: bool, groups: int, group: int, seed: int
) -> None:
    """Any width, bits, clip and group: each number is the definition's in float64, to fp32 rounding; x is left alone."""
    x = spread(4, groups * group, seed=seed)
    before = x.clone()
    quantizer = Quantizer(Grid(bits, symmetric), clip, group, inside)
    expected = torch.tensor(naive.activation(x.numpy(), bits, symmetric, clip, group, inside))
    step = (x.abs().max() * 2 / (2**bits - 1)).item()
    got = quantizer(x)
    differs = (got - expected).abs() > 1e-5 * x.abs().max()
    assert torch.equal(x, before)
    assert not differs.any() or (((got - expected).abs()[differs] < 2 * step).all() and differs.sum() <= 1)  # a tie


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_are_quotients_to_the_last_bit(bits: int) -> None:
    """max|w| · p / levels in this order, not max|w| · (p / levels): where weights lie on ties, as bf16 ones do, the other
    order sends some of them to other levels than the public implementations do."""
    weight = spread(512, 8).bfloat16().float()
    top, high = weight.abs().amax(1), 2 ** (bits - 1) - 1
    protocol = replace(OSP, weight_bits=bits)
    assert torch.equal(weight_scales(weight, replace(protocol, weight_clip="none"))[0][:, 0], top.clamp(min=1e-5) / high)
    searched = weight_scales(weight, protocol)[0]
    candidates = torch.stack([top * (1 - i / 100) / high for i in range(80)], 1)
    assert ((searched == candidates).any(1) | (top < 1e-5)).all()


def test_activations_of_any_layout_and_dtype() -> None:
    """Views that are not contiguous and bf16 give what copies and fp32 give, in the dtype they came in."""
    x = spread(3, 5, 4, 8)
    quantizer = Quantizer(Grid(4, False))
    view = x.transpose(1, 2)
    assert torch.equal(quantizer(view), quantizer(view.contiguous()))
    half = quantizer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, quantizer(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e30, 1e-30])
def test_constant_groups_survive(symmetric: bool, value: float) -> None:
    """A group of one value, zero included, comes back without NaN: exactly where it can be, within a step where not."""
    x = torch.full((2, 6), value)
    for inside in (True, False):
        got = Quantizer(Grid(4, symmetric), zero_inside=inside)(x)
        assert torch.allclose(got, x, rtol=1e-5, atol=1e-11)


@given(st.integers(2, 8), st.booleans(), st.integers(1, 4), st.integers(1, 40), st.integers(0, 50))
def test_weights_are_the_definition(bits: int, symmetric: bool, rows: int, inputs: int, seed: int) -> None:
    """Each row's error, at the clip that was found, is that of the definition's best clip in float64."""
    weight = spread(rows, inputs, seed=seed)
    protocol = replace(OSP, weight_bits=bits, weight_symmetric=symmetric)
    got = round_to_nearest(weight, protocol)
    expected = naive.weight(weight.numpy(), bits, symmetric)

    def error(x: Any) -> Any:
        return (np.abs(np.asarray(x, dtype=np.float64) - weight.double().numpy()) ** 2.4).sum(1)

    assert np.allclose(error(got), error(expected), rtol=2e-3, atol=1e-12)
    assert all(len(row.unique()) <= 2**bits for row in got)


def test_the_clip_pays() -> None:
    """One large weight in a long row is clipped; without the search the range is the whole."""
    weight = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 8.0
    scale, _ = weight_scales(weight, OSP)
    whole, _ = weight_scales(weight, replace(OSP, weight_clip="none"))
    assert scale.item() < 0.8 * whole.item() == pytest.approx(0.8 * 8 / 7)


@pytest.mark.parametrize("group", [1, 7, 16, 40, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_are_rows_of_their_own(group: int, symmetric: bool) -> None:
    """A group, a short last one included, is quantised as a matrix of that width alone would be."""
    weight = spread(3, 40)
    protocol = replace(OSP, weight_group=group, weight_symmetric=symmetric)
    parts = [round_to_nearest(part, replace(protocol, weight_group=part.shape[1])) for part in weight.split(group, 1)]
    assert torch.equal(round_to_nearest(weight, protocol), torch.cat(parts, 1))
    assert weight_scales(weight, protocol)[0].shape == (3, -(-40 // group))


@pytest.mark.parametrize("group", [None, 4, 40])
@pytest.mark.parametrize("inside", [True, False])
def test_whether_ranges_of_weights_hold_zero(group: int | None, inside: bool) -> None:
    """The knob decides it, and not whether there are groups: the definition's scales of rows that are positive."""
    weight = spread(3, 40).abs() + 1
    zeros = ("inputs", "keys", "weights") if inside else ("inputs", "keys")
    protocol = replace(OSP, weight_symmetric=False, weight_group=group, ranges_with_zero=zeros)
    expected = [
        [naive.weight_scale(part, 4, False, inside=inside)[0] for part in np.split(row, 40 // (group or 40))]
        for row in weight.double().numpy()
    ]
    assert torch.allclose(weight_scales(weight.double(), protocol)[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize(("shrink", "grid", "least"), [(0.57, 100, 0.44), (0.8, 100, 0.21), (0.29, 100, 0.72), (0.25, 10, 0.9)])
def test_how_far_clips_go(shrink: float, grid: int, least: float) -> None:
    """⌊shrink · grid⌋ candidates, as written: of a weight for which the smallest range is best, the last of them."""
    weight = torch.full((1, 1000), -0.9 * least)
    weight[0, 0] = 1.0
    protocol = replace(OSP, weight_bits=2, clip_shrink=shrink, clip_grid=grid)
    assert weight_scales(weight, protocol)[0].item() == pytest.approx(least, rel=1e-5)


def test_blocks_of_rows_change_nothing() -> None:
    """A matrix larger than a block gives what its rows give alone."""
    weight = spread(70, 1000)
    whole = round_to_nearest(weight, replace(OSP, clip_grid=10))
    rows = [round_to_nearest(row[None], replace(OSP, clip_grid=10)) for row in weight]
    assert torch.equal(whole, torch.cat(rows))


def test_levels_are_kept() -> None:
    """What is on the grid already stays when it is rounded again to the same scales."""
    weight = spread(5, 33)
    scale, zero = weight_scales(weight, OSP)
    once = round_weight(weight, scale, zero, OSP)
    assert torch.equal(round_weight(once, scale, zero, OSP), once)
    codes = once / scale
    assert weight_grid(OSP).low <= codes.round().min() < 0 < codes.round().max() <= weight_grid(OSP).high
    assert torch.allclose(codes, codes.round(), atol=1e-5)


def test_more_bits_lose_less() -> None:
    """The error falls with every bit, for weights and for activations."""
    x = spread(16, 64)
    protocols: list[Protocol] = [replace(OSP, weight_bits=bits) for bits in range(2, 9)]
    for errors in (
        [(round_to_nearest(x, protocol) - x).norm() for protocol in protocols],
        [(Quantizer(Grid(bits, False))(x) - x).norm() for bits in range(2, 9)],
    ):
        assert all(a > b for a, b in pairwise(errors))
