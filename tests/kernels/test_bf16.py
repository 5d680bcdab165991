"""The bf16 products against float64, for every shape; where the kernel does not run, these are torch's and hold them too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trilobit.kernels import bf16
from trilobit.kernels.bf16 import apply, apply_right, commuting, gram

SIZES = st.integers(1, 20) | st.integers(1, 130) | st.sampled_from([1, 2, 8, 16, 47, 48, 49, 96, 192])
NUMBERS = st.integers(1, 3)
SEEDS = st.integers(0, 99)
ROUNDED = 2**-7
"""Of one rounding to bf16, at most half of this."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def polynomials(number: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two symmetric matrices that commute up to bf16."""
    x = random(number, rows, rows + 3, seed=seed).double()
    a = (x @ x.mT / (rows + 3)).bfloat16()
    b = a.double() @ a.double() - a.double()
    return a, ((b + b.mT) / 2).bfloat16()


def runs(x: Tensor) -> bool:
    return bf16.runs_on(x.dtype, x.device)


def assert_rounded_once(found: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """As near as one rounding of the result, and fp32 sums of terms of this magnitude, allow."""
    if not runs(found):  # torch rounds between the product and what is added to it
        magnitude = magnitude * (ROUNDED / 1e-6)
    assert ((found.double() - exact).abs() <= 0.51 * ROUNDED * exact.abs() + 1e-6 * magnitude).all()


@given(NUMBERS, SIZES, SIZES, st.booleans(), SEEDS)
@settings(deadline=None)
def test_gram_is_the_product_with_its_transpose(number: int, rows: int, columns: int, transposed: bool, seed: int) -> None:
    """Of any shape, one row included, stored either way; exactly symmetric."""
    x = random(number, rows, columns, seed=seed)
    found = gram(x.mT.contiguous().mT if transposed else x, -0.3)
    exact, identity = x.double() @ x.double().mT, torch.eye(rows, dtype=torch.float64)
    assert_rounded_once(found, exact - 0.3 * identity, x.double().abs() @ x.double().abs().mT + identity)
    assert torch.equal(found, found.mT) or not runs(x)


@given(NUMBERS, SIZES, st.booleans(), SEEDS)
@settings(deadline=None)
def test_products_that_commute_are_those_of_float64(number: int, rows: int, square: bool, seed: int) -> None:
    """The lower triangle is the product's, with what is added; the upper one is its mirror image."""
    a, b = polynomials(number, rows, seed)
    if square:
        b = a
    found = commuting(a, b, 0.7, -1.5, 0.25)
    x, y = a.double(), b.double()
    exact, magnitude = 0.7 * x @ y - 1.5 * x + 0.25 * y, x.abs() @ y.abs() + 2 * x.abs() + y.abs()
    assert_rounded_once(found.tril(), exact.tril(), magnitude)
    assert torch.equal(found, found.mT) or not runs(a)


@given(NUMBERS, SIZES, SIZES, SEEDS)
@settings(deadline=None)
def test_apply_is_the_product_of_float64(number: int, rows: int, columns: int, seed: int) -> None:
    """From the left of wide and of tall matrices, and from the right of their transposes."""
    p, _ = polynomials(number, rows, seed)
    x = random(number, rows, columns, seed=seed + 1)
    exact = p.double() @ x.double() + 2.5 * x.double()
    magnitude = p.double().abs() @ x.double().abs() + 3 * x.double().abs()
    assert_rounded_once(apply(p, x, 2.5), exact, magnitude)
    assert_rounded_once(apply_right(x.mT.contiguous(), p, 2.5), exact.mT, magnitude.mT)
    assert_rounded_once(apply_right(x.mT, p, 2.5), exact.mT, magnitude.mT)


@pytest.mark.skipif(not bf16.available(), reason="no native library, or a processor without AVX512-BF16")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_threads_change_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from any number of threads."""
    x = random(3, 100, 70, seed=0)
    a, b = polynomials(2, 100, 0)
    for left, right, symmetric in [(x, x.mT, True), (a, b.mT, True), (a, x[:2].contiguous(), False)]:
        found = []
        for threads in (1, number):
            monkeypatch.setattr(bf16, "threads", lambda threads=threads: threads)
            found.append(bf16.product(left, right, symmetric=symmetric))
        assert torch.equal(*found)


def test_alone_leaves_torchs_threads_as_they_were() -> None:
    """Inside, nested or not, torch has one thread and the kernel what torch had; afterwards, also after an error, torch has its
    own again."""

    def fail() -> None:
        with bf16.alone(), bf16.alone():
            assert (torch.get_num_threads(), bf16.threads()) == (1, 3)
            raise ZeroDivisionError

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert (torch.get_num_threads(), bf16.threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not bf16.available(), reason="no native library, or a processor without AVX512-BF16")
def test_what_is_not_finite_stays_so() -> None:
    """NaN and infinity reach the row and column they are in, and no other."""
    x = random(1, 60, 50, seed=1)
    x[0, 55, 3] = float("nan")
    x[0, 7, 4] = float("inf")
    finite = gram(x)[0].isfinite()
    expected = torch.ones(60, 60, dtype=torch.bool)
    for row in (7, 55):
        expected[row, :] = expected[:, row] = False
    assert torch.equal(finite, expected)


def test_other_types_are_torchs() -> None:
    """In fp32 and float64 the kernel has no part, and every function is the formula."""
    x, identity = torch.randn(2, 5, 7, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    a = gram(x, 0.5)
    assert torch.allclose(a, x @ x.mT + 0.5 * identity)
    b = a @ a
    assert torch.allclose(commuting(a, b, 2.0, 3.0, 4.0), 2 * a @ b + 3 * a + 4 * b)
    assert torch.allclose(apply(a, x, 2.0), a @ x + 2 * x)
    assert torch.allclose(apply_right(x.mT, a, 2.0), x.mT @ a + 2 * x.mT)
