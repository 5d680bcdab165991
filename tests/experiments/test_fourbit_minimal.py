"""Fake 4-bit quantisation for the ablation's table."""

import pytest
import torch
from fourbit_minimal import fake_asymmetric, fake_weight, hadamard, quantized, rotate

from families import FAMILIES, build

IDS = torch.arange(24).view(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hadamard_on", [False, True])
def test_sixteen_bits_change_nothing(family: str, hadamard_on: bool) -> None:
    """Without quantisation the copy has the original's logits, rotated or not, and the original is left alone."""
    model = build(family)
    before = logits(model)
    assert torch.allclose(
        logits(quantized(model, 16, 16, 16, hadamard_on)), before, rtol=1e-4, atol=1e-4 * before.abs().max().item()
    )
    assert torch.equal(logits(model), before)


def test_fewer_bits_lose_more() -> None:
    """Weights, activations and cache each move the logits, and 4 bits move them further than 8."""
    model = build("llama")
    before = logits(model)

    def moved(*bits: int) -> float:
        return (logits(quantized(model, *bits, False)) - before).norm().item()

    for place in range(3):
        eight, four = ([bits if i == place else 16 for i in range(3)] for bits in (8, 4))
        assert 0 < moved(*eight) < 0.3 * moved(*four)


def test_grids_have_as_many_levels_as_they_should() -> None:
    """Symmetric weights take 15 values a row at most and keep zero; asymmetric ones 16, and keep zero."""
    torch.manual_seed(0)
    for row in fake_weight(torch.randn(5, 400), 4):
        assert len(row.unique()) <= 15 and 0 in row
    for x in (torch.randn(5, 400), torch.rand(5, 400) + 3):
        for row, original in zip(fake_asymmetric(x, 4), x, strict=True):
            assert len(row.unique()) <= 16
            assert (row - original).abs().max() <= (original.clamp(min=0).max() - original.clamp(max=0).min()) / 15


def test_a_clip_is_chosen_where_it_pays() -> None:
    """One large weight in a long row is clipped: the error is below that of the full range."""
    torch.manual_seed(0)
    weight = torch.randn(1, 4000)
    weight[0, 0] = 8.0
    full = (weight / (8 / 7)).round() * (8 / 7)
    assert (fake_weight(weight, 4) - weight).abs().pow(2.4).sum() < (full - weight).abs().pow(2.4).sum()


@pytest.mark.parametrize(("width", "block"), [(64, 64), (48, 16), (7, 1), (1408, 128)])
def test_rotations_are_orthogonal(width: int, block: int) -> None:
    """The block is the largest power of two in the width, and turning twice turns back."""
    matrix = hadamard(width)
    assert len(matrix) == block
    assert torch.allclose(matrix @ matrix.T, torch.eye(block, dtype=torch.float64))
    x = torch.randn(3, width, dtype=torch.float64)
    assert torch.allclose(rotate(rotate(x, matrix), matrix.T), x)
