"""Hadamard matrices are exact, and the fast transform is the dense one, forwards, backwards and compiled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trilobit.errors import UnsupportedError
from trilobit.fourbit.hadamard import (
    constructible,
    construction,
    find_construction,
    hadamard_matrix,
    inverse_transform,
    jacobsthal,
    prime_power,
    transform,
)

MISSED = [
    92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508, 520,
    532, 536, 584, 596, 604, 612, 652, 668, 712, 716, 732, 756, 764, 772, 808, 836, 852, 856, 872, 876, 892, 904, 932, 940,
    944, 952, 956, 964, 980, 988, 996,
]  # fmt: skip
"""Multiples of four up to 1000 that are known to be out of Paley's reach."""

WIDTHS = {
    576: "Sylvester 16 × Paley II 36 (GF(17))",
    960: "Sylvester 16 × Paley I 60 (GF(59))",
    1536: "Sylvester 128 × Paley I 12 (GF(11))",
    2048: "Sylvester 2048",
    2560: "Sylvester 128 × Paley I 20 (GF(19))",
    2816: "Sylvester 64 × Paley I 44 (GF(43))",
    3072: "Sylvester 256 × Paley I 12 (GF(11))",
    4096: "Sylvester 4096",
    4864: "Sylvester 64 × Paley II 76 (GF(37))",
    5504: "Sylvester 16 × Paley I 344 (GF(7³))",
    5632: "Sylvester 128 × Paley I 44 (GF(43))",
    6912: "Sylvester 64 × Paley I 108 (GF(107))",
    8192: "Sylvester 8192",
    8960: "Sylvester 64 × Paley I 140 (GF(139))",
    9216: "Sylvester 256 × Paley II 36 (GF(17))",
    11008: "Sylvester 32 × Paley I 344 (GF(7³))",
    13824: "Sylvester 128 × Paley I 108 (GF(107))",
    14336: "Sylvester 512 × Paley I 28 (GF(3³))",
    18944: "Sylvester 128 × Paley II 148 (GF(73))",
    28672: "Sylvester 1024 × Paley I 28 (GF(3³))",
}
"""Of real models' residual streams and MLPs."""

MORE_WIDTHS = [
    512, 896, 1152, 1408, 2304, 3584, 5120, 5376, 9728, 10240, 12288, 16384, 17408, 17920, 20480, 21504, 22016, 24576, 25600,
    27648, 29568, 36864, 53248,
]  # fmt: skip
"""Of further real models, from Qwen2.5-0.5B's stream to Llama-3.1-405B's MLP."""

SOME = [1, 2, 4, 12, 16, 20, 28, 36, 48, 52, 96, 100, 144, 344, 576]


def dense(n: int) -> Tensor:
    return hadamard_matrix(n) / math.sqrt(n)


def test_every_matrix_is_exactly_hadamard() -> None:
    """H Hᵀ = n I in integers, entries ±1, for every order up to 500 that is constructed."""
    orders = [n for n in range(1, 501) if constructible(n)]
    assert len(orders) == 2 + 500 // 4 - sum(n <= 500 for n in MISSED)
    for n in orders:
        matrix = hadamard_matrix(n)
        assert matrix.dtype == torch.float64 and matrix.shape == (n, n)
        assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
        assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))  # sums of ±1 are exact in float64


def test_orders_that_are_missed() -> None:
    """Up to 1000, what is refused is what no multiple of four should be and Paley's known gaps, no more and no less."""
    assert [n for n in range(4, 1001, 4) if not constructible(n)] == MISSED
    assert [n for n in range(1, 1001) if n % 4 and constructible(n)] == [1, 2]


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_real_models(width: int) -> None:
    """Every width in the list is reached, by the construction with the smallest Paley factor, which is exactly Hadamard."""
    assert construction(width) == WIDTHS[width]
    made = find_construction(width)
    assert made.sylvester * made.paley == width
    factor = hadamard_matrix(made.paley)
    assert torch.equal(factor @ factor.T, made.paley * torch.eye(made.paley, dtype=torch.float64))


def test_widths_of_further_models() -> None:
    """None of them is out of reach."""
    assert [n for n in MORE_WIDTHS if not constructible(n)] == []


@pytest.mark.parametrize("power", [(3, 2), (5, 2), (7, 2), (3, 3), (7, 3), (3, 4), (11, 1), (13, 1)])
def test_jacobsthal_matrices_are_those_of_a_field(power: tuple[int, int]) -> None:
    """Q Qᵀ = q I − J, Q J = 0 and Qᵀ = χ(−1) Q, which hold for the differences of a field and of no other ring."""
    q = power[0] ** power[1]
    matrix = jacobsthal(*power).double()
    ones = torch.ones(q, q, dtype=torch.float64)
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q, dtype=torch.float64) - ones)
    assert not (matrix @ ones).any()
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@given(st.integers(1, 5000))
def test_prime_powers(q: int) -> None:
    """(p, k) is returned exactly where q = p^k with p prime."""
    primes = [p for p in range(2, q + 1) if q % p == 0 and all(p % d for d in range(2, math.isqrt(p) + 1))]
    expected = None if len(primes) != 1 else (primes[0], round(math.log(q, primes[0])))
    assert prime_power(q) == expected


@pytest.mark.parametrize("n", [3, 92, 172, 250, 1000 * 172 + 4])
def test_refusals_say_which_width_and_what_else(n: int) -> None:
    """A width out of reach is named, with the caller's remedy or the largest block in reach that divides it."""
    block = max(d for d in range(1, n) if n % d == 0 and constructible(d))
    offer = f"block that divides it and has one is {block}" if block > 1 else "No block"
    for attempt in (construction, hadamard_matrix, lambda width: transform(torch.ones(width))):
        with pytest.raises(UnsupportedError, match=f"width {n} .*{offer}"):
            attempt(n)
    with pytest.raises(UnsupportedError, match=f"width {n} .*Take another"):
        construction(n, "Take another.")


@pytest.mark.parametrize("n", [*SOME, 2048])
def test_transform_is_the_dense_product(n: int) -> None:
    """In float64 to 1e-12, both ways, over the last dimension of any shape; the two undo each other."""
    x = torch.randn(2, 3, n, dtype=torch.float64)
    assert torch.allclose(transform(x), x @ dense(n).T, rtol=0, atol=1e-12)
    assert torch.allclose(inverse_transform(x), x @ dense(n), rtol=0, atol=1e-12)
    assert torch.allclose(inverse_transform(transform(x)), x, rtol=0, atol=1e-12)
    assert torch.allclose(transform(x[0, 0]), transform(x)[0, 0], rtol=0, atol=1e-12)
    assert transform(x[:0]).shape == (0, 3, n)


@given(st.sampled_from([n for n in range(1, 130) if constructible(n)]), st.integers(0, 5), st.booleans())
def test_transform_of_odd_shapes(n: int, rows: int, strided: bool) -> None:
    """Any number of rows, contiguous or not, every constructible order: the dense product, and x is left as it was."""
    x = torch.randn(n, rows, dtype=torch.float64).T if strided else torch.randn(rows, n, dtype=torch.float64)
    before = x.clone()
    assert torch.allclose(transform(x), before @ dense(n).T, rtol=0, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [20, 344, 576, 2048])
def test_low_precision_errors(n: int) -> None:
    """fp32: no worse than a dense fp32 product. bf16 and fp16: the fp32 transform, rounded once."""
    x = torch.randn(64, n)
    exact = x.double() @ dense(n).T
    fast, plain = transform(x), x @ dense(n).float().T
    assert (fast - exact).norm() <= 1.1 * (plain - exact).norm()
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert transform(low).dtype == dtype
        assert torch.equal(transform(low), transform(low.float()).to(dtype))


@pytest.mark.parametrize("n", SOME)
def test_gradients(n: int) -> None:
    """The backward is the inverse transform, and has a backward of its own."""
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    if n <= 52:
        assert torch.autograd.gradcheck(transform, x)
        assert torch.autograd.gradcheck(inverse_transform, x)
        assert torch.autograd.gradgradcheck(transform, x)
    upstream = torch.randn(3, n, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(transform(x), x, upstream)
    assert torch.allclose(gradient, upstream @ dense(n), rtol=0, atol=1e-12)


def test_paley_one_is_not_symmetric() -> None:
    """The gradients above would not notice a missing transposition if every factor were symmetric: Paley I's is not."""
    assert not torch.equal(hadamard_matrix(12), hadamard_matrix(12).T)
    assert torch.equal(hadamard_matrix(36), hadamard_matrix(36).T)


def test_compiles_without_a_break() -> None:
    """One graph, forwards and backwards, through the operator's own contract."""
    x = torch.randn(3, 12, requires_grad=True)
    torch.library.opcheck(torch.ops.trilobit.hadamard.default, (x, False))
    compiled = torch.compile(lambda y: transform(y * 2).sin(), fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(transform(x * 2).sin().sum(), x)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(compiled(x), transform(x * 2).sin())
    assert torch.equal(found, expected)


def test_an_outlier_is_spread() -> None:
    """One channel's value becomes ± the same in all: the point of it all."""
    x = torch.zeros(1, 344, dtype=torch.float64)
    x[0, 5] = 100
    assert torch.allclose(transform(x).abs(), torch.full((1, 344), 100 / math.sqrt(344), dtype=torch.float64))
