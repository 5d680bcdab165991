"""Which implementation computes a product here, and why.

Every choice is exact: the same integers whatever is chosen. The reason is kept in words, because a slow path that does
not say so is the field's most common disappointment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trilobit import quant
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
    if device_type == "cuda":
        return Choice("int8", "torch._int_mm: int8 tensor cores")
    return Choice("fp32", f"fp32 matmul on integer values: no int8 product is known for {device_type}")


def integer_linear(
    codes: Tensor, scale: Tensor, weight_codes: Tensor, weight_scale: Tensor, granularity: Granularity
) -> Tensor:
    """quant.integer_linear without a bias, on int8 instructions: the same numbers to the last bit.

    codes: [T, K] int8, scale: [T, 1]; weight_codes: [O, K] int8, weight_scale as quant.absmean_scale. Returns [T, O] in
    the dtype of `scale`.
    """
    group = quant.group_size(granularity)
    if group is None:
        return int8_matmul(codes, weight_codes).to(scale.dtype).mul_(scale * weight_scale.T)
    y = torch.zeros(codes.shape[0], weight_codes.shape[0], dtype=scale.dtype, device=codes.device)
    for index in range(weight_scale.shape[1]):
        part = slice(index * group, (index + 1) * group)
        sums = int8_matmul(codes[:, part].contiguous(), weight_codes[:, part].contiguous())
        y += sums.to(scale.dtype).mul_(weight_scale[:, index])
    return y.mul_(scale)


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
    if fits and int8_choice(kind).name == "int8":
        return torch._int_mm(codes, weight_codes.T)  # pyright: ignore[reportPrivateImportUsage]
    exact = torch.float32 if inputs <= EXACT_IN_FP32 else torch.float64
    return codes.to(exact) @ weight_codes.to(exact).T
