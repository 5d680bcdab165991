"""RMSNorm and the int8 quantiser in one pass over a row, and the norm's backward in another.

    n = (x · r) · g,  r = 1/√(mean x² + ε)        a = max(|n|, 1e-5)        code = round(n · (127 · 1/a)),  scale = a / 127
    ∂x = r · (∂n·g − x̂ · mean(∂n·g·x̂)),  x̂ = x · r        ∂g = Σ_t ∂n · x̂

A program holds ROWS rows whole, so x is read once and codes are written once; a plain RMSNorm writes twice as many bytes.
Several gains for the same x (q, k and v with norms of their own) are a second axis of the grid.
The backward gives each program a run of rows and adds ∂g up in fp32, one partial row a program, which torch sums: the result
does not depend on timing.

Letters: T tokens, K inputs, P programs of the backward, S gains.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from trilobit.kernels.triton_launch import empty, launch, round_half_even
from trilobit.quant import FLOOR

TILE = 4096
"""Numbers that a program of the forward holds, at least; a wider row is one program's."""


@triton.jit
def norm_quantize_kernel(
    x, gain, codes, scale, inverse, tokens, inputs, gain_stride, eps, floor,
    NORM: tl.constexpr, SCALAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    which = tl.program_id(1)
    gain += which * gain_stride
    codes += which.to(tl.int64) * tokens * inputs
    scale += which * tokens
    inverse += which * tokens
    inside = (rows < tokens)[:, None] & (columns < inputs)[None, :]
    offsets = rows.to(tl.int64)[:, None] * inputs + columns[None, :]
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        r = tl.math.rsqrt(tl.sum(values * values, axis=1) / inputs + eps)
        tl.store(inverse + rows, r, mask=rows < tokens)
        if SCALAR:
            values = values * r[:, None] * tl.load(gain).to(tl.float32)
        else:
            values = values * r[:, None] * tl.load(gain + columns, mask=columns < inputs, other=0.0).to(tl.float32)[None, :]
    # As integers the bits of |x| are ordered like |x|, with NaN above all: the largest of them hides no NaN.
    bits = tl.max(tl.abs(values).to(tl.int32, bitcast=True), axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    absmax = tl.where(absmax < floor, floor, absmax)
    limit = tl.full([ROWS], 127.0, tl.float32)
    tl.store(scale + rows, tl.math.div_rn(absmax, limit), mask=rows < tokens)
    factor = tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), absmax) * limit
    levels = values * factor[:, None]
    levels = tl.where(levels == levels, levels, 0.0)  # NaN has code 0, and a scale that is NaN
    levels = tl.minimum(tl.maximum(levels, -128.0), 127.0)
    tl.store(codes + offsets, round_half_even(levels).to(tl.int8), mask=inside)


@triton.jit
def norm_backward_kernel(
    x, inverse, gain, dnormed, factor, dx, partial, tokens, inputs, rows_each,
    FACTOR: tl.constexpr, SCALAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < inputs
    if SCALAR:
        g = tl.load(gain).to(tl.float32) + tl.zeros([BLOCK], tl.float32)
    else:
        g = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    f = 1.0
    if FACTOR:
        f = tl.load(factor).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = program * rows_each
    for row in range(first, tl.minimum(first + rows_each, tokens)):
        offsets = tl.cast(row, tl.int64) * inputs + columns
        r = tl.load(inverse + row)
        normalized = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) * r
        d = tl.load(dnormed + offsets, mask=inside, other=0.0).to(tl.float32) * f
        product = d * normalized
        total += product
        mean = tl.sum(product * g, axis=0) / inputs
        tl.store(dx + offsets, ((d * g - normalized * mean) * r).to(dx.dtype.element_ty), mask=inside)
    if SCALAR:
        tl.store(partial + program, tl.sum(total, axis=0))
    else:
        tl.store(partial + tl.cast(program, tl.int64) * inputs + columns, total, mask=inside)


def norm_quantize(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """gpu.norm_quantize: x [T, K] contiguous → codes [T, K] int8, scales [T, 1], 1/rms [T, 1] (of a norm)."""
    gains = None if gain is None else gain.reshape(1, -1)
    codes, scale, inverse = norm_quantize_each(x, gains, eps)
    return codes[0], scale[0], inverse[0]


def norm_quantize_each(x: Tensor, gains: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """norm_quantize with each of the gains [S, K] or [S, 1], contiguous (None: once, no norm): [S, T, K], [S, T, 1] twice."""
    (tokens, inputs), sets = x.shape, 1 if gains is None else gains.shape[0]
    codes = torch.empty(sets, tokens, inputs, dtype=torch.int8, device=x.device)
    scale, inverse = (torch.empty(sets, tokens, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return codes, scale.fill_(FLOOR / 127), inverse
    block = triton.next_power_of_2(inputs)
    rows = max(1, TILE // block)
    width = 0 if gains is None else gains.shape[1]
    launch(
        norm_quantize_kernel, (triton.cdiv(tokens, rows), sets),
        x, x if gains is None else gains, codes, scale, inverse, tokens, inputs, width, eps, FLOOR,
        NORM=gains is not None, SCALAR=width == 1 and inputs > 1, ROWS=rows, BLOCK=block,
        num_warps=_warps(rows * block), exact=True,
    )  # fmt: skip
    return codes, scale, inverse


def norm_backward(x: Tensor, inverse: Tensor, gain: Tensor, dnormed: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """gpu.norm_backward: contiguous x and dnormed [T, K] → ∂x [T, K], ∂gain."""
    tokens, inputs = x.shape
    dx = empty((tokens, inputs), x.dtype, x)
    if x.numel() == 0:
        return dx.to(x.dtype), torch.zeros_like(gain)
    scalar = gain.numel() == 1 and inputs > 1
    programs = min(tokens, 4 * _processors(x.device))
    rows_each = triton.cdiv(tokens, programs)
    programs = triton.cdiv(tokens, rows_each)
    partial = torch.empty(programs, 1 if scalar else inputs, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(inputs)
    launch(
        norm_backward_kernel, (programs,),
        x, inverse, gain, dnormed, x if factor is None else factor, dx, partial, tokens, inputs, rows_each,
        FACTOR=factor is not None, SCALAR=scalar, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx.to(x.dtype), partial.sum(dim=0).to(gain.dtype).reshape(gain.shape)


def _warps(numbers: int) -> int:
    """Warps for a tile of so many numbers: 16 a thread, within what a program can have."""
    return min(16, max(4, numbers // (32 * 16)))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
