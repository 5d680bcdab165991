"""What the Triton kernels share: how they are launched, how they round, and what Triton's interpreter rounds otherwise.

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


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, exact: bool = False, **options: Any) -> None:
    """Run a kernel over a grid of programs. exact: products and sums are rounded apart, never fused."""
    kernel[grid](*arguments, enable_fp_fusion=not exact, **options)


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """What a kernel writes its result into: uninitialised, of the dtype, or fp32 where that must be cast afterwards."""
    return torch.empty(shape, dtype=torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype, device=like.device)
