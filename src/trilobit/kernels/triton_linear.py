"""The product of int8 activations and ternary weights on int8 tensor cores, with its scales, bias and cast in the same kernel.

    y = (Σ_k code_x · code_w) · (s_x · s_w) + b        with groups: (Σ_g (Σ_{k in g} code_x · code_w) · s_wg) · s_x + b

Sums are int32, exact; what follows is rounded in the order of quant.integer_linear and fuses nothing, so the bits are its own.
torch._int_mm leaves T × O int32 sums that a second kernel reads: at 8 bytes a sum that costs as much again as the product
itself up to some two thousand inputs on an H100 (3 TB/s, 1.5 POP/s). Weights are int8, or two-bit lanes
(formats.LaneTwoBit) that each tile unpacks; a byte holds four columns that lie four apart, so that it is loaded four times,
from the cache.

A tile of BLOCK_T tokens × BLOCK_O outputs is one program's; programs go through eight rows of tiles at a time, which share the
weights they read. Operands are loaded with the inputs contiguous, as int8 tensor cores want both.

Letters: T tokens, K inputs, O outputs, G groups of a row.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from trilobit.kernels.triton_launch import empty, launch, round_half_even, store_scaled

TILE_ROWS = 8
INPUTS_AT_ONCE = 128


@triton.jit
def ternarize_kernel(weight, scale, codes, outputs, inputs, groups, group, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr):
    """group: inputs a scale; groups: scales a row, 0 where all rows share one."""
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < outputs)[:, None] & (columns < inputs)[None, :]
    offsets = rows.to(tl.int64)[:, None] * inputs + columns[None, :]
    values = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(scale + rows[:, None] * groups + (columns // group)[None, :], mask=inside, other=1.0)
    levels = values * tl.math.div_rn(tl.full([BLOCK_O, BLOCK_K], 1.0, tl.float32), s)
    levels = tl.where(levels == levels, levels, 0.0)
    levels = tl.minimum(tl.maximum(levels, -1.0), 1.0)
    tl.store(codes + offsets, round_half_even(levels).to(tl.int8), mask=inside)


@triton.jit
def linear_kernel(
    x, x_scale, weight, weight_scale, bias, y, tokens, outputs, inputs, row_bytes, groups, group,
    PACKED: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SCALES: 0 one for the matrix, 1 a row, 2 a row and group. EVEN: no block reaches past the end of its group."""
    tiles_t, tiles_o = tl.cdiv(tokens, BLOCK_T), tl.cdiv(outputs, BLOCK_O)
    band, place = tl.program_id(0) // (TILE_ROWS * tiles_o), tl.program_id(0) % (TILE_ROWS * tiles_o)
    height = tl.minimum(tiles_t - band * TILE_ROWS, TILE_ROWS)
    rows = (band * TILE_ROWS + place % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    outs = (place // height) * BLOCK_O + tl.arange(0, BLOCK_O)
    x_rows = x + rows.to(tl.int64)[:, None] * inputs
    w_rows = weight + outs.to(tl.int64)[:, None] * row_bytes
    result = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for g in range(groups):
        end = tl.minimum((g + 1) * group, inputs)
        sums = tl.zeros([BLOCK_T, BLOCK_O], tl.int32)
        for start in range(g * group, end, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            if EVEN:
                x_inside, w_inside = (rows < tokens)[:, None], (outs < outputs)[:, None]
            else:
                x_inside = (rows < tokens)[:, None] & (columns < end)[None, :]
                w_inside = (outs < outputs)[:, None] & (columns < end)[None, :]
            a = tl.load(x_rows + columns[None, :], mask=x_inside, other=0)
            if PACKED:  # byte j of a lane of 16 columns has columns j, 4 + j, 8 + j and 12 + j
                lane = tl.load(w_rows + (columns // 16 * 4 + columns % 4)[None, :], mask=w_inside, other=0x55)
                b = ((lane.to(tl.int32) >> (columns % 16 // 4 * 2)[None, :]) & 3).to(tl.int8) - 1
            else:
                b = tl.load(w_rows + columns[None, :], mask=w_inside, other=0)
            sums = tl.dot(a, tl.trans(b.to(tl.int8)), sums, out_dtype=tl.int32)
        if SCALES == 2:
            s = tl.load(weight_scale + outs.to(tl.int64) * groups + g, mask=outs < outputs, other=0.0)
            result += sums.to(tl.float32) * s[None, :]
        else:
            result = sums.to(tl.float32)
    store_scaled(result, x_scale, weight_scale, bias, y, rows, outs, tokens, outputs, SCALES, BIAS)


def ternarize(weight: Tensor, scale: Tensor, group: int) -> Tensor:
    """gpu.ternarize: weight [O, K] contiguous, scale [1, 1], [O, 1] or [O, G] → codes [O, K] int8."""
    outputs, inputs = weight.shape
    codes = torch.empty_like(weight, dtype=torch.int8)
    if weight.numel():
        groups = 0 if scale.numel() == 1 and not group else scale.shape[1]
        width = min(1024, triton.next_power_of_2(inputs))
        height = 4096 // width
        launch(
        ternarize_kernel, (triton.cdiv(outputs, height), triton.cdiv(inputs, width)),
            weight, scale, codes, outputs, inputs, groups, group or inputs,
            BLOCK_O=height, BLOCK_K=width, num_warps=8, exact=True,
        )  # fmt: skip
    return codes


def linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype,
    packed: bool,
) -> Tensor:  # fmt: skip
    """gpu.int8_linear, or with `packed` gpu.packed_linear: weight [O, K] int8, or [O, 4 · ceil(K/16)] uint8. Contiguous."""
    (tokens, inputs), outputs = codes.shape, weight.shape[0]
    y = empty((tokens, outputs), dtype, codes)
    if y.numel() == 0:
        return y.to(dtype)
    block_k = next((size for size in (INPUTS_AT_ONCE, INPUTS_AT_ONCE // 2) if (group or inputs) % size == 0), INPUTS_AT_ONCE)
    even = inputs % block_k == 0
    largest = 128 if even else 64  # masks along the inputs take registers
    block_t = min(largest, max(16, triton.next_power_of_2(tokens)))
    launch(
        linear_kernel, (triton.cdiv(tokens, block_t) * triton.cdiv(outputs, largest),),
        codes, scale, weight, weight_scale, scale if bias is None else bias, y, tokens, outputs, inputs, weight.shape[1],
        triton.cdiv(inputs, group) if group else 1, group or inputs,
        PACKED=packed, SCALES=2 if group else int(weight_scale.numel() > 1), BIAS=bias is not None,
        EVEN=even, TILE_ROWS=TILE_ROWS, BLOCK_T=block_t, BLOCK_O=largest, BLOCK_K=block_k,
        num_warps=8 if block_t == 128 else 4, num_stages=3, exact=True,
    )  # fmt: skip
    return y.to(dtype)
