"""Integer products are exact whatever implementation is chosen."""

import pytest
import torch

from trilobit.kernels import dispatch
from trilobit.kernels.dispatch import Choice, int8_choice, int8_matmul

SHAPES = [
    (1, 32, 8),
    (3, 33, 17),
    (17, 1, 5),
    (1, 1, 1),
    (5, 7, 1),
    (0, 8, 3),
    (16, 129, 31),
    (33, 64, 65),
    (2, 4096, 3),
]


def force(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(dispatch, "int8_choice", lambda kind: Choice(name, "forced by a test"))


@pytest.mark.parametrize("name", ["int8", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_exact(shape: tuple[int, int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation equals int64 arithmetic on full-range int8 codes: odd shapes, one token, none, one input."""
    force(monkeypatch, name)
    tokens, inputs, outputs = shape
    for extreme in (False, True):
        codes = torch.randint(-128, 128, (tokens, inputs), dtype=torch.int8)
        weight = torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)
        if extreme:  # saturates an implementation that adds pairs in int16
            codes, weight = torch.full_like(codes, 127), torch.ones_like(weight)
        y = int8_matmul(codes, weight)
        assert y.shape == (tokens, outputs)
        assert torch.equal(y.long(), codes.long() @ weight.long().T)


@pytest.mark.parametrize("name", ["int8", "fp32"])
def test_strided_codes_are_read_rightly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and weights that are slices or transposes give the same product."""
    force(monkeypatch, name)
    codes = torch.randint(-127, 128, (20, 66), dtype=torch.int8)
    weight = torch.randint(-1, 2, (66, 10), dtype=torch.int8)
    for x, w in [(codes[::2, ::2], weight[::2].T), (codes.T[:20, :20], weight[:20].T), (codes[:, :1], weight[:1].T)]:
        assert torch.equal(int8_matmul(x, w).long(), x.long() @ w.long().T)


def test_wide_products_do_not_lose_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without int8 instructions, sums above 2²⁴ are still exact."""
    force(monkeypatch, "fp32")
    codes = torch.full((1, dispatch.EXACT_IN_FP32 + 5000), 127, dtype=torch.int8)
    codes[0, 1::7] = 126
    weight = torch.ones(2, codes.shape[1], dtype=torch.int8)
    weight[1, 3] = 0
    expected = codes.long() @ weight.long().T
    assert expected.max() > 2**24
    assert torch.equal(int8_matmul(codes, weight).long(), expected)


def test_choice_says_why() -> None:
    """A device that nothing is known about falls back to fp32, and every choice has a reason in words."""
    assert int8_choice("quantum").name == "fp32"
    assert "quantum" in int8_choice("quantum").reason
    assert int8_choice("cpu").name in ("int8", "fp32")
    assert "VNNI" in int8_choice("cpu").reason
