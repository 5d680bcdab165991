"""The products of Muon's iteration, in bf16 on the native or the GPU kernel where one runs, else as torch computes them.

    gram      X·Xᵀ + δ·I
    commuting α·A·B + β·A + γ·B      of symmetric A, B with AB = BA, as polynomials of one matrix have: symmetric again
    apply     P·X + δ·X, or X·P + δ·X

The kernel (AVX512-BF16) computes one triangle of what is symmetric and mirrors it; what is added is added in fp32, and all of
it rounded once. Its threads are not torch's, and those keep their cores busy for some milliseconds after each operator,
waiting for the next: between products, torch should do without them (`alone`).

On a GPU with Triton, kernels/triton_symmetric.py does the same for the symmetric ones; cuBLAS is as good for the others.

Letters: N matrices, R rows, C columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from trilobit.kernels import gpu, native


def available() -> bool:
    """Whether the kernel runs here: the library is there and the processor has AVX512-BF16."""
    library = native._library()
    return library is not None and bool(library.functions["bf16_runs_here"]())


def runs_on(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the native kernel multiplies matrices of this type there."""
    return dtype == torch.bfloat16 and device.type == "cpu" and available()


_threads: ContextVar[int | None] = ContextVar("threads", default=None)


def threads() -> int:
    """How many the kernel uses: torch's number, of before `alone`."""
    return _threads.get() or torch.get_num_threads()


@contextmanager
def alone() -> Iterator[None]:
    """torch's operators run on the calling thread only, the kernel on as many threads as before."""
    number = torch.get_num_threads()
    token = _threads.set(threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
        _threads.reset(token)


def _native(x: Tensor) -> bool:
    return x.numel() > 0 and runs_on(x.dtype, x.device)


def _on_gpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and gpu.available(x.device.type)


def gram(x: Tensor, diagonal: float = 0.0) -> Tensor:
    """X·Xᵀ + diagonal·I of each X [N, R, C]; exactly symmetric where a kernel computes it."""
    if _on_gpu(x):
        from trilobit.kernels.triton_symmetric import symmetric

        return symmetric(x, x, diagonal=diagonal)
    if _native(x):
        return product(x, x.mT, diagonal=diagonal, symmetric=True)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    return torch.baddbmm(identity, x, x.mT, beta=diagonal)


def commuting(a: Tensor, b: Tensor, alpha: float = 1.0, of_a: float = 0.0, of_b: float = 0.0) -> Tensor:
    """alpha·A·B + of_a·A + of_b·B of each pair [N, R, R] of symmetric matrices that commute."""
    if _on_gpu(a):
        from trilobit.kernels.triton_symmetric import symmetric

        return symmetric(a, b, alpha, of_a, of_b)
    if _native(a):
        return product(a, b.mT, alpha, of_a, of_b, symmetric=True)
    found = torch.baddbmm(a, b, a, beta=of_a, alpha=alpha)
    return found.add_(b, alpha=of_b) if of_b else found


def apply(p: Tensor, x: Tensor, of_x: float = 0.0) -> Tensor:
    """P·X + of_x·X of each P [N, R, R] and X [N, R, C]."""
    return product(p, x, of_b=of_x) if _native(x) else torch.baddbmm(x, p, x, beta=of_x)


def apply_right(x: Tensor, p: Tensor, of_x: float = 0.0) -> Tensor:
    """X·P + of_x·X of each X [N, R, C] and symmetric P [N, C, C]."""
    return product(x, p.mT, of_a=of_x) if _native(x) else torch.baddbmm(x, x, p, beta=of_x)


def product(
    a: Tensor, b: Tensor, alpha: float = 1.0, of_a: float = 0.0, of_b: float = 0.0, diagonal: float = 0.0,
    symmetric: bool = False,
) -> Tensor:  # fmt: skip
    """alpha·A·B + of_a·A + of_b·B + diagonal·I of each pair A [N, R, K], B [N, K, M] bf16: [N, R, M].

    Added up in fp32 and rounded once. symmetric: the result is known to be, and A and B are where they are added; one triangle
    is computed and mirrored. Transposed views are taken as they are, other views copied.
    """
    (number, rows, inner), columns = a.shape, b.shape[-1]
    assert b.shape == (number, inner, columns), (a.shape, b.shape)
    a, b = native._checked(a, torch.bfloat16, 3), native._checked(b, torch.bfloat16, 3)
    (a, a_transposed), (b, b_transposed) = _stored(a, not of_a or symmetric), _stored(b, not of_b or symmetric)
    c = torch.empty(number, rows, columns, dtype=a.dtype)
    native._loaded().call(
        "bf16_product", a.data_ptr(), a_transposed, b.data_ptr(), b_transposed, c.data_ptr(), number, rows, inner, columns,
        symmetric, alpha, of_a, of_b, diagonal, threads(),
    )  # fmt: skip
    return c


def _stored(x: Tensor, may_be_transposed: bool) -> tuple[Tensor, bool]:
    """x [N, R, K] in memory that lies row by row, and whether column by column instead."""
    transposed = may_be_transposed and not x.is_contiguous() and x.mT.is_contiguous()
    return (x if transposed else x.contiguous()), transposed
