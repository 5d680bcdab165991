"""Muon's symmetric products on the Triton kernel, against float64, and the whole iteration on it."""

import pytest
import torch
from torch import Tensor

from trilobit.kernels import bf16, gpu
from trilobit.train.muon import orthogonalize

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDED = 2**-7


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE, torch.bfloat16)


def assert_rounded_once(found: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    assert ((found.double() - exact).abs() <= 0.51 * ROUNDED * exact.abs() + 1e-6 * magnitude).all()


@pytest.mark.parametrize(("number", "rows", "columns"), [(2, 5, 70), (1, 150, 64), (1, 1, 1), (1, 200, 3), (0, 3, 3)])
def test_gram(number: int, rows: int, columns: int) -> None:
    """X·Xᵀ + δ·I of any shape, one tile and several, stored either way; symmetric to the bit, rounded once."""
    x = random(number, rows, columns)
    identity = torch.eye(rows, dtype=torch.float64, device=DEVICE)
    exact, magnitude = x.double() @ x.double().mT - 0.3 * identity, x.double().abs() @ x.double().abs().mT + identity
    for stored in (x, x.mT.contiguous().mT):
        found = bf16.gram(stored, -0.3)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, found.mT)
        assert_rounded_once(found, exact, magnitude)


@pytest.mark.parametrize(("number", "rows"), [(2, 5), (1, 150), (1, 1)])
def test_products_that_commute(number: int, rows: int) -> None:
    """α·A·B + β·A + γ·B: the lower triangle is the product's, the upper one its mirror image."""
    x = random(number, rows, rows + 3).double()
    a = (x @ x.mT / (rows + 3)).bfloat16()
    b = a.double() @ a.double() - a.double()
    b = ((b + b.mT) / 2).bfloat16()
    found = bf16.commuting(a, b, 0.7, -1.5, 0.25)
    x, y = a.double(), b.double()
    exact, magnitude = 0.7 * x @ y - 1.5 * x + 0.25 * y, x.abs() @ y.abs() + 2 * x.abs() + y.abs()
    assert torch.equal(found, found.mT)
    assert_rounded_once(found.tril(), exact.tril(), magnitude)


@pytest.mark.parametrize("coefficients", ["quintic", "polar-express"])
@pytest.mark.parametrize("shape", [(2, 40, 25), (1, 30, 140)])
def test_the_iteration(shape: tuple[int, int, int], coefficients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the kernels the iteration is as near to that of float64 as on torch's products, wide and tall."""
    x = torch.randn(*shape).to(DEVICE)
    exact = orthogonalize(x.double(), coefficients, torch.float64)  # pyright: ignore[reportArgumentType]
    ours = orthogonalize(x, coefficients)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(gpu, "DEVICES", ())
    monkeypatch.setattr(bf16, "available", lambda: False)
    theirs = orthogonalize(x, coefficients)  # pyright: ignore[reportArgumentType]
    error, baseline = ((found.double() - exact).norm().item() for found in (ours, theirs))
    assert error <= 1.2 * baseline
