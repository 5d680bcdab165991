"""Which implementation computes a product here, and why.

Every choice is exact: the same integers whatever is chosen. The reason is kept in words, because a slow path that does
not say so is the field's most common disappointment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trilobit import quant
from trilobit.kernels import gpu
from trilobit.quant import EXACT_IN_FP32, Granularity

# torch._int_mm on CUDA (cuBLASLt) takes more than 16 rows, and widths that are multiples of 8.
CUDA_MIN_TOKENS = 17
CUDA_MULTIPLE = 8


@dataclass(frozen=True)
class Choice:
    """An implementation's name and the reason it was chosen, in words for the user."""

    name: str
    reason: str


@torch.compiler.assume_constant_result  # the compiler refuses to trace the question, and warns of functools.cache
def _has_vnni() -> bool:
    return torch.cpu._is_vnni_supported()  # pyright: ignore[reportPrivateImportUsage]


def int8_choice(device_type: str) -> Choice:
    """How int8 × int8 products are computed on a kind of device (`cpu`, `cuda`, …)."""
    if device_type == "cpu":
        if _has_vnni():
            return Choice("int8", "torch._int_mm: this processor has VNNI instructions")
        return Choice("fp32", "fp32 matmul on integer values: this processor has no VNNI instructions")
    if gpu.available(device_type):
        return Choice("triton", "a Triton kernel on int8 tensor cores: scales, bias and cast in the product, no int32 sums")
    if device_type == "cuda":
        return Choice("int8", "torch._int_mm: int8 tensor cores (Triton is not installed)")
    return Choice("fp32", f"fp32 matmul on integer values: no int8 product is known for {device_type}")


def ternary_codes(weight: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """quant.ternary_codes, on a GPU by a kernel of its own: what inductor makes of a reciprocal there is not rounded right."""
    if weight.dtype == torch.float32 and gpu.available(weight.device.type):
        return gpu.ternarize(weight, scale, quant.group_size(granularity) or 0)
    return quant.ternary_codes(weight, scale, granularity)


def integer_linear(
    codes: Tensor, scale: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None, granularity: Granularity,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """quant.integer_linear on int8 instructions: the same numbers to the last bit, cast to dtype (None: that of `scale`) last.

    codes: [T, K] int8, scale: [T, 1]; weight_codes: [O, K] int8, weight_scale as quant.absmean_scale; bias: [O] or None.
    Returns [T, O].
    """
    dtype, group = dtype or scale.dtype, quant.group_size(granularity)
    if scale.dtype == torch.float32 and gpu.available(codes.device.type):
        return gpu.int8_linear(codes, scale, weight_codes, weight_scale, bias, group or 0, dtype)
    if group is None:
        y = int8_matmul(codes, weight_codes).to(scale.dtype).mul_(scale * weight_scale.T)
    else:
        y = torch.zeros(codes.shape[0], weight_codes.shape[0], dtype=scale.dtype, device=codes.device)
        for index in range(weight_scale.shape[1]):
            part = slice(index * group, (index + 1) * group)
            sums = int8_matmul(codes[:, part].contiguous(), weight_codes[:, part].contiguous())
            y += sums.to(scale.dtype).mul_(weight_scale[:, index])
        y = y.mul_(scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def int8_matmul(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """Exact integer product of int8 codes.

    codes: [T, K] int8, weight_codes: [O, K] int8. Returns [T, O], int32 or floating point holding exact integers.
    """
    tokens, inputs = codes.shape
    outputs = weight_codes.shape[0]
    kind = codes.device.type
    if kind == "cuda":
        fits = tokens >= CUDA_MIN_TOKENS and inputs % CUDA_MULTIPLE == 0 and outputs % CUDA_MULTIPLE == 0
    else:
        fits = tokens > 0 and inputs > 1  # torch 2.13 on CPU reads a transposed [1, O] wrongly
    if fits and int8_choice(kind).name != "fp32":
        return torch._int_mm(codes, weight_codes.T)  # pyright: ignore[reportPrivateImportUsage]
    exact = torch.float32 if inputs <= EXACT_IN_FP32 else torch.float64
    return codes.to(exact) @ weight_codes.to(exact).T
