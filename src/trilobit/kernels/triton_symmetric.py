"""Symmetric products of bf16 matrices, of which one triangle is computed and mirrored: Muon's iteration on a GPU.

    C = α·A·Bᵀ + β·A + γ·B + δ·I        known to be symmetric: A = B, or A and B symmetric and commuting

Sums are fp32, what is added is added in fp32, and all of it is rounded once. Programs whose tile lies above the diagonal return
at once; the others store their tile and, off the diagonal, its transpose: half the operations of a plain product, and a result
that is symmetric to the bit. Any strides, so that a transposed view costs nothing.

Letters: N matrices, R rows, K what is summed over.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from trilobit.kernels.triton_launch import INTERPRETED, empty, launch

BLOCK, BLOCK_K = 128, 64


@triton.jit
def symmetric_kernel(
    a, b, c, rows, inner, alpha, of_a, of_b, diagonal, a_n, a_r, a_k, b_n, b_r, b_k,
    ADD: tl.constexpr, EVEN: tl.constexpr, FP32: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ADD: β or γ is not zero (and K = R). EVEN: K is a multiple of BLOCK_K. FP32: operands are cast, for the interpreter."""
    tiles = tl.cdiv(rows, BLOCK)
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if j > i:
        return
    number = tl.program_id(1).to(tl.int64)
    down, across = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    a_base, b_base = a + number * a_n, b + number * b_n
    a_rows = a_base + down.to(tl.int64)[:, None] * a_r
    b_rows = b_base + across.to(tl.int64)[:, None] * b_r
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, inner, BLOCK_K):
        places = (start + k)[None, :]
        if EVEN:
            a_inside, b_inside = (down < rows)[:, None], (across < rows)[:, None]
        else:
            a_inside, b_inside = (down < rows)[:, None] & (places < inner), (across < rows)[:, None] & (places < inner)
        left = tl.load(a_rows + places * a_k, mask=a_inside, other=0.0)
        right = tl.load(b_rows + places * b_k, mask=b_inside, other=0.0)
        if FP32:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    sums = sums * alpha
    inside = (down < rows)[:, None] & (across < rows)[None, :]
    if ADD:
        added = tl.load(a_rows + across[None, :] * a_k, mask=inside, other=0.0).to(tl.float32) * of_a
        b_here = b_base + down.to(tl.int64)[:, None] * b_r + across[None, :] * b_k
        sums += added + tl.load(b_here, mask=inside, other=0.0).to(tl.float32) * of_b
    sums += tl.where(down[:, None] == across[None, :], diagonal, 0.0)
    if i == j:
        sums = tl.where(down[:, None] >= across[None, :], sums, tl.trans(sums))
    c_base = c + number * rows * rows
    result = sums.to(c.dtype.element_ty)
    tl.store(c_base + down.to(tl.int64)[:, None] * rows + across[None, :], result, mask=inside)
    if i != j:
        mirrored = (across < rows)[:, None] & (down < rows)[None, :]
        tl.store(c_base + across.to(tl.int64)[:, None] * rows + down[None, :], tl.trans(result), mask=mirrored)


def symmetric(a: Tensor, b: Tensor, alpha: float = 1.0, of_a: float = 0.0, of_b: float = 0.0, diagonal: float = 0.0) -> Tensor:
    """alpha·A·Bᵀ + of_a·A + of_b·B + diagonal·I of each pair A, B [N, R, K] bf16: [N, R, R] bf16, contiguous."""
    number, rows, inner = a.shape
    assert a.shape == b.shape and a.dtype == b.dtype == torch.bfloat16, (a.shape, b.shape, a.dtype, b.dtype)
    assert not (of_a or of_b) or rows == inner, (rows, inner)
    c = empty((number, rows, rows), a.dtype, a)
    if c.numel():
        launch(
            symmetric_kernel, (triton.cdiv(rows, BLOCK) ** 2, number),
            a, b, c, rows, inner, float(alpha), float(of_a), float(of_b), float(diagonal), *a.stride(), *b.stride(),
            ADD=bool(of_a or of_b), EVEN=inner % BLOCK_K == 0, FP32=INTERPRETED, BLOCK=BLOCK, BLOCK_K=BLOCK_K,
            num_warps=8, num_stages=3,
        )  # fmt: skip
    return c.to(a.dtype)
