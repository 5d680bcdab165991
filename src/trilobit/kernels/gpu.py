"""The GPU kernels as operators: what each computes, the shapes it gives, and where it runs. The kernels are triton_*.py.

    norm_quantize   x ──▶ RMSNorm (or none) ──▶ int8 codes, a scale a token, 1/rms          one pass over x
    norm_backward   ∂normed ──▶ ∂x, ∂gain                                                   one pass over x and ∂normed
    ternarize       W, s ──▶ codes                                                          the bits of quant.ternary_codes
    int8_linear     (Σ code_x · code_w) · (s_x · s_w) + b, cast last                        the bits of quant.integer_linear
    packed_linear   the same from two-bit codes (formats.LaneTwoBit): one to 16 tokens as a matrix–vector product, more as a
                    matrix product that unpacks tiles to int8
    merged_linear   norms, quantiser and packed_linear of a few tokens for linears that read the same x, in two launches

Operators of torch.library with fake kernels: torch.compile sees shapes, does not look inside, breaks no graph, and calls once
what is called twice with the same operands (q, k and v of one input without norms of their own share its codes).

Divisions are rounded as IEEE asks and no product is fused with a sum, or the bits would not be the definition's: what inductor
makes of quant.py for a GPU keeps neither. Triton is imported at the first call. Written and tested with Triton's interpreter
(TRITON_INTERPRET=1); these kernels have not run on a GPU yet: bench/kernels.py compares them there with the definition.

Letters: T tokens, K inputs, O outputs, G groups of a row.
"""

from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

DEVICES: tuple[str, ...] = ("cuda",)
"""Where the kernels run. Tests put the CPU here, which Triton's interpreter then computes on."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = 16
"""Up to so many tokens two-bit weights are met by a matrix–vector kernel."""
WIDEST_ROW = 1 << 15
"""A program holds a whole row in registers; beyond this torch computes norm and quantiser."""


@torch.compiler.assume_constant_result  # the compiler cannot trace the question
def available(device_type: str) -> bool:
    """Whether the kernels run on a kind of device (`cuda`, …): it is one of theirs, and Triton is installed."""
    return device_type in DEVICES and find_spec("triton") is not None


def runs_on(x: Tensor) -> bool:
    """Whether the kernels take activations like x: the device, the dtype, and how wide they are."""
    return x.dtype in DTYPES and x.shape[-1] <= WIDEST_ROW and available(x.device.type)


def norm_quantize(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [T, K] int8, scales [T, 1] fp32 and 1/rms [T, 1] fp32 (None without a gain) of x [T, K].

    gain: [K], [1], or None for no norm: then codes and scales have the bits of quant.int8_codes. With a gain they are those of
    (x · 1/rms) · gain, and 1/rms differs from quant.rms_norm's by the order of one sum.
    """
    codes, scale, inverse = torch.ops.trilobit.norm_quantize(x.contiguous(), gain, eps)
    return codes, scale, None if gain is None else inverse


def norm_backward(x: Tensor, inverse: Tensor, gain: Tensor, dnormed: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """∂x [T, K] in x's dtype and ∂gain (as gain) of normed = (x · inverse) · gain.

    inverse: [T, 1] fp32; dnormed: [T, K]; factor: one number that dnormed is multiplied by, or None.
    """
    return torch.ops.trilobit.norm_backward(x.contiguous(), inverse, gain, dnormed.contiguous(), factor)


def ternarize(weight: Tensor, scale: Tensor, group: int) -> Tensor:
    """quant.ternary_codes of weight [O, K]: int8. scale: fp32, [1, 1], [O, 1] or [O, G]; group: inputs a scale, 0 for all."""
    return torch.ops.trilobit.ternarize(weight.detach().contiguous(), scale.contiguous(), group)


def int8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """quant.integer_linear in fp32, cast to dtype last: [T, O].

    codes: [T, K] int8; scale: [T, 1] fp32; weight: [O, K] int8; weight_scale and group as for ternarize; bias: [O] or None.
    """
    operands = codes.contiguous(), scale.contiguous(), weight.contiguous(), weight_scale.contiguous(), bias
    return torch.ops.trilobit.int8_linear(*operands, group, dtype)


def packed_linear(
    codes: Tensor, scale: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """int8_linear with the weights in two bits: packed is formats.LaneTwoBit's, [O, 4 · ceil(K/16)] uint8."""
    operands = codes.contiguous(), scale.contiguous(), packed.contiguous(), weight_scale.contiguous(), bias
    return torch.ops.trilobit.packed_linear(*operands, group, dtype)


def merges(sizes: tuple[int, ...], normed: bool, tokens: int, inputs: int, group: int) -> bool:
    """Whether merged_linear takes so many tokens of linears with so many outputs each, with norms of their own or without."""
    from trilobit.kernels import triton_few

    if not 0 < tokens <= FEW or len(sizes) > 3:
        return False
    block = triton_few.row_block(tokens, inputs, group)
    return not normed or all(end % block == 0 for end in accumulate(sizes[:-1]))


def merged_linear(
    x: Tensor, gains: Tensor | None, eps: float, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int,
    sizes: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """packed_linear of norm_quantize of x [T, K] for S linears whose weights lie one below the other, where `merges`: [T, O] in
    x's dtype, the same bits.

    gains: [S, K] or [S, 1], or None for no norms; packed, weight_scale ([O, 1] or [O, G]) and bias: of all O rows; sizes: of
    them, how many are each linear's. Not an operator: graphs that are compiled take linears one by one.
    """
    from trilobit.kernels import triton_few, triton_norm

    codes, scale, _ = triton_norm.norm_quantize_each(x.contiguous(), gains, eps)
    ends = () if gains is None else tuple(accumulate(sizes[:-1]))
    return triton_few.linear_each(codes, scale, packed, weight_scale, bias, group, ends, x.dtype)


_operators = torch.library.Library("trilobit", "FRAGMENT")
_operators.define("norm_quantize(Tensor x, Tensor? gain, float eps) -> (Tensor, Tensor, Tensor)")
_operators.define("norm_backward(Tensor x, Tensor inverse, Tensor gain, Tensor dnormed, Tensor? factor) -> (Tensor, Tensor)")
_operators.define("ternarize(Tensor weight, Tensor scale, int group) -> Tensor")
_operators.define(
    "int8_linear(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, int group, ScalarType dtype)"
    " -> Tensor"
)

_operators.define(
    "packed_linear(Tensor codes, Tensor scale, Tensor packed, Tensor weight_scale, Tensor? bias, int group, ScalarType dtype)"
    " -> Tensor"
)


def _norm_quantize(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from trilobit.kernels import triton_norm

    return triton_norm.norm_quantize(x, gain, eps)


def _norm_backward(x: Tensor, inverse: Tensor, gain: Tensor, dnormed: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    from trilobit.kernels import triton_norm

    return triton_norm.norm_backward(x, inverse, gain, dnormed, factor)


def _ternarize(weight: Tensor, scale: Tensor, group: int) -> Tensor:
    from trilobit.kernels import triton_linear

    return triton_linear.ternarize(weight, scale, group)


def _int8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    from trilobit.kernels import triton_linear

    return triton_linear.linear(codes, scale, weight, weight_scale, bias, group, dtype, packed=False)


def _packed_linear(
    codes: Tensor, scale: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    from trilobit.kernels import triton_few, triton_linear

    if codes.shape[0] <= FEW:
        return triton_few.linear(codes, scale, packed, weight_scale, bias, group, dtype)
    return triton_linear.linear(codes, scale, packed, weight_scale, bias, group, dtype, packed=True)


for _device in ("CUDA", "CPU"):  # the CPU for Triton's interpreter
    _operators.impl("norm_quantize", _norm_quantize, _device)
    _operators.impl("norm_backward", _norm_backward, _device)
    _operators.impl("ternarize", _ternarize, _device)
    _operators.impl("int8_linear", _int8_linear, _device)
    _operators.impl("packed_linear", _packed_linear, _device)


@torch.library.register_fake("trilobit::norm_quantize", lib=_operators)
def _(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    column = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), column, torch.empty_like(column)


@torch.library.register_fake("trilobit::norm_backward", lib=_operators)
def _(x: Tensor, inverse: Tensor, gain: Tensor, dnormed: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gain)


@torch.library.register_fake("trilobit::ternarize", lib=_operators)
def _(weight: Tensor, scale: Tensor, group: int) -> Tensor:
    return torch.empty_like(weight, dtype=torch.int8)


@torch.library.register_fake("trilobit::int8_linear", lib=_operators)
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


@torch.library.register_fake("trilobit::packed_linear", lib=_operators)
def _(
    codes: Tensor, scale: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape[0], packed.shape[0], dtype=dtype)
