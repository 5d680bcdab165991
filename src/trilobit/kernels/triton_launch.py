"""What the Triton kernels share: how they are launched, round and scale, and what Triton's interpreter rounds otherwise.

In the interpreter (triton 3.9) a cast to bf16 cuts bits off instead of rounding, and tl.dot of bf16 operands is wrong without
saying so. Kernels therefore leave fp32 there, which torch rounds, and cast operands of bf16 products to fp32 first.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@triton.jit
def round_half_even(x):
    """x, between −2²² and 2²², to the nearest integer, ties to even: plus 1.5 · 2²³ and minus it again. What is given must not
    come straight from a product: a compiler that fuses it with the sum would round once instead of twice."""
    shift: tl.constexpr = 12582912.0
    return (x + shift) - shift


@triton.jit
def store_scaled(
    result, x_scale, weight_scale, bias, y, rows, outs, tokens, outputs, SCALES: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """y[rows, outs] = result · (s_x · s_w) + bias, in this order, as quant.integer_linear rounds it. SCALES: of the weights,
    0 one for the matrix, 1 a row, 2 a row and group (in `result` already)."""
    token_scale = tl.load(x_scale + rows, mask=rows < tokens, other=0.0)[:, None]
    if SCALES == 0:
        result = result * (token_scale * tl.load(weight_scale))
    elif SCALES == 1:
        result = result * (token_scale * tl.load(weight_scale + outs, mask=outs < outputs, other=0.0)[None, :])
    else:
        result = result * token_scale
    if BIAS:
        result = result + tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (rows < tokens)[:, None] & (outs < outputs)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * outputs + outs[None, :], result.to(y.dtype.element_ty), mask=inside)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, exact: bool = False, **options: Any) -> None:
    """Run a kernel over a grid of programs. exact: products and sums are rounded apart, never fused."""
    kernel[grid](*arguments, enable_fp_fusion=not exact, **options)


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """What a kernel writes its result into: uninitialised, of the dtype, or fp32 where that must be cast afterwards."""
    return torch.empty(shape, dtype=torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype, device=like.device)
