"""The product of a few tokens with two-bit weights: one pass over the weights, which is all that it costs.

    Σ_k code_x · code_w = Σ_k x_k · symbol_k − Σ_k x_k,  symbol = code + 1

A lane of 16 symbols (formats.LaneTwoBit) is a 32-bit word; shifted by 2i and masked it is four symbols, one a byte, which dp4a
multiplies by four int8 activations and adds up: three instructions for four weights. Plain arithmetic on single symbols takes
several for each, too many for an H100 to keep up with its memory, which brings some 60 weights a cycle to each of its 132
processors. Where there is no dp4a (the interpreter, AMD) it is spelled out.

Weights of several linears that read the same x, one below the other, are met in one launch; where each has a norm of its own, a
program takes the codes that belong to its rows.

A program owns BLOCK_O rows and keeps BLOCK_T × BLOCK_O × BLOCK_L partial sums, added up once at the end (with groups: of each).

Letters: T tokens, O outputs, L lanes of a row, G groups of a row.
"""

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from trilobit.formats import LaneTwoBit
from trilobit.kernels.triton_launch import INTERPRETED, empty, launch, store_scaled

LANES_AT_ONCE = 32


@triton.jit
def add_products(sums, symbols, x, DP4A: tl.constexpr):
    """sums + Σ_j symbol_j · x_j over the bytes of symbols (0 … 3) and x (signed); all int32, broadcast."""
    if DP4A:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [symbols, x, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for j in tl.static_range(4):
            sums += ((symbols >> (8 * j)) & 3) * ((x << (24 - 8 * j)) >> 24)
    return sums


@triton.jit
def few_kernel(
    x, x_scale, packed, weight_scale, bias, y, tokens, outputs, lanes, groups, group_lanes, end_0, end_1,
    SETS: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr, DP4A: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """x: [SETS, T, 4 · L] int32, packed: [O, L] int32. SCALES: 0 one for the matrix, 1 a row, 2 a row and group. Rows below
    end_0 read the first of x, those below end_1 the second, the others the third; blocks do not straddle."""
    rows = tl.arange(0, BLOCK_T)
    if SETS > 1:
        first = tl.program_id(0) * BLOCK_O
        which = (first >= end_0).to(tl.int32) + (first >= end_1).to(tl.int32)
        x += which * tokens * (4 * lanes)
        x_scale += which * tokens
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    w_rows = packed + outs.to(tl.int64)[:, None] * lanes
    x_rows = x + rows[:, None] * (4 * lanes)
    result = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    ones = tl.full([BLOCK_T, BLOCK_L], 0x01010101, tl.int32)
    for g in range(groups):
        end = tl.minimum((g + 1) * group_lanes, lanes)
        sums = tl.zeros([BLOCK_T, BLOCK_O, BLOCK_L], tl.int32)
        x_sums = tl.zeros([BLOCK_T, BLOCK_L], tl.int32)
        for start in range(g * group_lanes, end, BLOCK_L):
            places = start + tl.arange(0, BLOCK_L)
            words = tl.load(w_rows + places[None, :], mask=(outs < outputs)[:, None] & (places < end)[None, :], other=0)
            x_inside = (rows < tokens)[:, None] & (places < end)[None, :]
            for i in tl.static_range(4):
                four = tl.load(x_rows + 4 * places[None, :] + i, mask=x_inside, other=0)
                symbols = (words >> (2 * i)) & 0x03030303
                sums = add_products(sums, symbols[None, :, :], four[:, None, :], DP4A)
                x_sums = add_products(x_sums, ones, four, DP4A)
        total = (tl.sum(sums, axis=2) - tl.sum(x_sums, axis=1)[:, None]).to(tl.float32)
        if SCALES == 2:
            s = tl.load(weight_scale + outs.to(tl.int64) * groups + g, mask=outs < outputs, other=0.0)
            result += total * s[None, :]
        else:
            result = total
    store_scaled(result, x_scale, weight_scale, bias, y, rows, outs, tokens, outputs, SCALES, BIAS)


def linear(
    codes: Tensor, scale: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """gpu.packed_linear of one to 16 tokens or so: codes [T, K] int8, packed [O, 4 · L] uint8, contiguous → [T, O]."""
    return linear_each(codes[None], scale, packed, weight_scale, bias, group, (), dtype)


def linear_each(
    codes: Tensor, scale: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int, ends: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same of linears one below the other, each with codes of its own: codes [S, T, K], scale [S, T, 1], S ≤ 3. ends: of
    all but the last, the row of `packed` after its last one; no row_block holds rows of two."""
    (sets, tokens, inputs), (outputs, row_bytes) = codes.shape, packed.shape
    assert sets == len(ends) + 1 <= 3 and not any(end % row_block(tokens, inputs, group) for end in ends), (codes.shape, ends)
    y = empty((tokens, outputs), dtype, codes)
    if y.numel() == 0:
        return y.to(dtype)
    lanes = row_bytes // 4
    words = F.pad(codes, (0, -inputs % LaneTwoBit.COLUMNS)).view(torch.int32)
    group_lanes = group // LaneTwoBit.COLUMNS or lanes
    block_o, end_0, end_1 = row_block(tokens, inputs, group), *(*ends, outputs, outputs)[:2]
    launch(
        few_kernel, (triton.cdiv(outputs, block_o),),
        words, scale, packed.view(torch.int32), weight_scale, scale if bias is None else bias, y, tokens, outputs, lanes,
        triton.cdiv(lanes, group_lanes), group_lanes, end_0, end_1,
        SETS=sets, SCALES=2 if group else int(weight_scale.numel() > 1), BIAS=bias is not None, DP4A=_has_dp4a(),
        BLOCK_T=triton.next_power_of_2(tokens), BLOCK_O=block_o, BLOCK_L=_lane_block(inputs, group), num_warps=4, exact=True,
    )  # fmt: skip
    return y.to(dtype)


def row_block(tokens: int, inputs: int, group: int) -> int:
    """Rows of weights that a program owns."""
    return (16 if tokens <= 2 else 8) * (LANES_AT_ONCE // _lane_block(inputs, group))


def _lane_block(inputs: int, group: int) -> int:
    lanes = group // LaneTwoBit.COLUMNS or triton.cdiv(inputs, LaneTwoBit.COLUMNS)
    return min(LANES_AT_ONCE, triton.next_power_of_2(lanes))


def _has_dp4a() -> bool:
    return not INTERPRETED and torch.version.hip is None
