"""Hadamard matrices, constructed rather than tabled, and the fast orthonormal transform by them.

    H = S ⊗ P        S: Sylvester's of order 2^a, P: Paley's of order n / 2^a, the smallest that exists

    Paley I   order q + 1,    q ≡ 3 (mod 4)     I + [[0, 1ᵀ], [−1, Q]]
    Paley II  order 2(q + 1), q ≡ 1 (mod 4)     C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]],  C = [[0, 1ᵀ], [1, Q]]

q is a prime power and Q_ij = χ(a_i − a_j) with the quadratic character χ of GF(q) (Paley 1933). A table of the odd factors
would be a thousand lines; the field is ten. GF(p^k) is searched for as the first polynomial modulo which x runs through
all p^k − 1 nonzero elements; χ is then +1 on the even powers of x and −1 on the odd ones, so nothing is ever squared.
Derivations: docs/math.md.

The transform costs n·(|P| + Σ 2^aᵢ) operations a row instead of n²: products with small dense factors, which BLAS runs at
its full rate. It is one operator with the inverse transform as its backward, so that autograd and compilers see no
intermediate values.

Letters: n width, a exponent of two, q order of a field, p its prime, k its degree.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from trilobit.errors import UnsupportedError

Kind = Literal["I", "II"]

LARGEST_FACTOR = 64
"""Of the dense factors that a transform multiplies by, unless Paley's alone is larger."""
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Construction:
    """H = Sylvester(sylvester) ⊗ Paley(paley). kind is None where there is no Paley factor (paley = 1)."""

    sylvester: int
    paley: int = 1
    kind: Kind | None = None
    prime: int = 0
    degree: int = 0

    def __str__(self) -> str:
        parts = [f"Sylvester {self.sylvester}"] if self.sylvester > 1 or self.kind is None else []
        if self.kind is not None:
            power = f"{self.prime}{str(self.degree).translate(SUPERSCRIPTS)}" if self.degree > 1 else f"{self.prime}"
            parts.append(f"Paley {self.kind} {self.paley} (GF({power}))")
        return " × ".join(parts)


def find_construction(n: int, remedy: str = "") -> Construction:
    """The construction of order n with the smallest Paley factor. Raises UnsupportedError, which ends in the caller's `remedy`,
    where Sylvester × Paley has none."""
    made = _search(n)
    if made is not None:
        return made
    why = "Hadamard matrices have orders 1, 2 and multiples of 4" if n % 4 else "Sylvester × Paley I/II does not reach it"
    if not remedy:
        block = next(size for size in range(n - 1, 0, -1) if n % size == 0 and constructible(size))
        remedy = f"The largest block that divides it and has one is {block}." if block > 1 else "No block of it has one."
    raise UnsupportedError(f"no Hadamard matrix of width {n} can be constructed here: {why}. {remedy}")


@lru_cache(maxsize=4096)
def _search(n: int) -> Construction | None:
    assert n >= 1, n
    for exponent in range((n & -n).bit_length() - 1, -1, -1):
        order = n >> exponent
        if order == 1:
            return Construction(n)
        candidates: list[tuple[Kind, int, int]] = [("I", order - 1, 3)]
        if order % 2 == 0:
            candidates.append(("II", order // 2 - 1, 1))
        for kind, q, residue in candidates:
            field = prime_power(q) if q % 4 == residue else None
            if field is not None:
                return Construction(1 << exponent, order, kind, *field)
    return None


def construction(n: int, remedy: str = "") -> str:
    """How the Hadamard matrix of order n is made, e.g. "Sylvester 16 × Paley I 344 (GF(7³))". Raises UnsupportedError."""
    return str(find_construction(n, remedy))


def constructible(n: int) -> bool:
    """Whether hadamard_matrix(n) exists here."""
    return _search(n) is not None


def hadamard_matrix(n: int) -> Tensor:
    """H [n, n], float64 of ±1 with H Hᵀ = n I, on the CPU; a new tensor. Raises UnsupportedError."""
    made = find_construction(n)
    return torch.kron(_sylvester(made.sylvester), _paley(made)).double()


def transform(x: Tensor) -> Tensor:
    """Each row x of [..., n] becomes H x / √n: an orthonormal transform over the last dimension, in x's dtype.

    Computed in float64 for float64, else in fp32 and rounded once at the end: in fp32 the error is below that of a dense
    fp32 product with H/√n, in bf16 it is one rounding. As a matrix on the right it is R = Hᵀ/√n, so a linear whose
    input is transformed keeps its output if its weight [O, n] is transformed as well: (x R)(W R)ᵀ = x Wᵀ.
    Differentiable to any order, and one node for torch.compile. Raises UnsupportedError.
    """
    return torch.ops.trilobit.hadamard(x, False)


def inverse_transform(x: Tensor) -> Tensor:
    """Each row x of [..., n] becomes Hᵀ x / √n. The same as `transform` where H is symmetric; Paley I's is not."""
    return torch.ops.trilobit.hadamard(x, True)


@torch.library.custom_op("trilobit::hadamard", mutates_args=())
def _hadamard(x: Tensor, inverse: bool) -> Tensor:
    assert x.is_floating_point() and x.ndim >= 1, (x.dtype, x.shape)
    n = x.shape[-1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    sizes, matrices = _factors(n, inverse, compute, x.device)
    y = x.to(compute).reshape(-1, n)
    behind = n  # elements of a row from the current factor's index on
    for size, matrix in zip(sizes[:-1], matrices[:-1], strict=True):
        behind //= size
        y = torch.matmul(matrix, y.reshape(-1, size, behind))
    y = y.reshape(-1, sizes[-1]) @ matrices[-1].T
    return y.reshape(x.shape).to(x.dtype)


@_hadamard.register_fake
def _(x: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)  # the width may be symbolic here: it is checked when the operator runs


def _remember(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.trilobit.hadamard(gradient, not ctx.inverse), None


_hadamard.register_autograd(_backward, setup_context=_remember)


@lru_cache(maxsize=64)
def _factors(n: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """Orthonormal dense factors whose Kronecker product is H/√n (or its transpose), and their orders, outermost first."""
    made = find_construction(n)
    last, exponent = _paley(made), made.sylvester.bit_length() - 1
    while exponent and 2 * len(last) <= LARGEST_FACTOR:
        last, exponent = torch.kron(_sylvester(2), last), exponent - 1
    steps = math.ceil(exponent / (LARGEST_FACTOR.bit_length() - 1))
    exponents = [exponent // steps + (step < exponent % steps) for step in range(steps)]
    matrices = [*(_sylvester(1 << e) for e in exponents), last]
    scaled = [(m.T if inverse else m).to(device, torch.float64) / math.sqrt(len(m)) for m in matrices]
    return tuple(len(m) for m in matrices), tuple(m.to(dtype).contiguous() for m in scaled)


def _sylvester(order: int) -> Tensor:
    """[order, order] int8, order a power of two: (−1)^(bits that i and j share)."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@lru_cache(maxsize=16)
def _paley(made: Construction) -> Tensor:
    """Paley's factor, int8; [[1]] where there is none."""
    if made.kind is None:
        return torch.ones(1, 1, dtype=torch.int8)
    q = made.prime**made.degree
    sign = -1 if made.kind == "I" else 1
    core = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    core[0, 1:] = 1
    core[1:, 0] = sign
    core[1:, 1:] = jacobsthal(made.prime, made.degree)
    one = torch.eye(q + 1, dtype=torch.int8)
    if made.kind == "I":
        return core + one
    plus, minus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, plus) + torch.kron(one, minus)


def jacobsthal(p: int, k: int) -> Tensor:
    """Q [q, q] int8 with Q_ij = χ(a_i − a_j), q = p^k odd. Element i has the base-p digits of i as its coefficients."""
    q = p**k
    character = torch.zeros(q, dtype=torch.int8)
    for power, element in enumerate(_powers_of_generator(p, k)):
        character[element] = 1 if power % 2 == 0 else -1
    places = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // places % p
    index = torch.zeros(q, q, dtype=torch.int64)
    for place, digit in zip(places.tolist(), digits.T, strict=True):
        index += (digit[:, None] - digit[None, :]) % p * place
    return character[index]


def _powers_of_generator(p: int, k: int) -> list[int]:
    """x⁰, x¹, … x^(q−2) in GF(p)[x] modulo the first polynomial x^k − Σ c_i x^i under which they are all different.

    All q − 1 nonzero polynomials are then powers of x, hence units: what they form is the field GF(p^k).
    """
    q = p**k
    for constants in product(range(p), repeat=k):
        if constants[0] == 0:
            continue  # x would divide zero
        powers = list(_orbit(constants, p))
        if len(powers) == q - 1:
            return powers
    raise AssertionError((p, k))


def _orbit(constants: tuple[int, ...], p: int) -> Iterator[int]:
    """Powers of x from x⁰ until they return to 1, as numbers of base-p digits, where x^k = Σ constants_i x^i."""
    one = (1, *(0 for _ in constants[1:]))
    element = one
    while True:
        yield sum(digit * p**place for place, digit in enumerate(element))
        top = element[-1]
        shifted = (0, *element[:-1])
        element = tuple((digit + top * constant) % p for digit, constant in zip(shifted, constants, strict=True))
        if element == one:
            return


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None
