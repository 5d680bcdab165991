"""ggml's types for what is not ternary, and the sizes of all that are written: numbers in, bytes out.

F32, F16, BF16 and Q8_0 as the gguf package writes them, bit for bit; Q6_K, which it only reads, rounded to the nearest here.
"""

import gguf
import numpy as np
import torch
from torch import Tensor

from trilobit.formats import Q2_0, TQ1_0, TQ2_0

_TYPE = gguf.GGMLQuantizationType
KINDS: dict[str, tuple[int, int, int]] = {
    "f32": (1, 4, _TYPE.F32), "f16": (1, 2, _TYPE.F16), "bf16": (1, 2, _TYPE.BF16), "q8_0": (32, 34, _TYPE.Q8_0),
    "q6_k": (256, 210, _TYPE.Q6_K), "q2_0": (Q2_0.BLOCK, Q2_0.SIZE, Q2_0.TYPE), "tq1_0": (TQ1_0.BLOCK, TQ1_0.SIZE, TQ1_0.TYPE),
    "tq2_0": (TQ2_0.BLOCK, TQ2_0.SIZE, TQ2_0.TYPE),
}  # fmt: skip
"""Columns of a block, its bytes, and ggml's number of the type."""


CHUNK = 1 << 20  # weights that are rounded at a time


def encode(tensor: Tensor, kind: str) -> np.ndarray:
    """[..., K] as the bytes of a type that is not ternary. K must be a multiple of its block."""
    values = tensor.detach().float().cpu().contiguous()
    if kind == "f32":
        return values.numpy()
    if kind == "f16":
        return values.half().numpy()
    if kind == "bf16":
        return values.bfloat16().view(torch.int16).numpy()
    block, size, _ = KINDS[kind]
    blocks, rounded = values.view(-1, block), {"q8_0": _q8_0, "q6_k": _q6_k}[kind]
    packed = torch.empty(len(blocks), size, dtype=torch.uint8)
    for start in range(0, len(blocks), CHUNK // block):
        part = slice(start, start + CHUNK // block)
        packed[part] = rounded(blocks[part])
    return packed.view(*values.shape[:-1], -1).numpy()


def rounded(tensor: Tensor, kind: str) -> Tensor:
    """[..., K] as a type that is not ternary holds it, in fp32 again."""
    data = encode(tensor, kind)
    values = gguf.quants.dequantize(data.view(np.uint16) if kind == "bf16" else data, _TYPE(KINDS[kind][2]))
    return torch.from_numpy(np.array(values, dtype=np.float32)).view(tensor.shape).to(tensor.device, tensor.dtype)


def _q8_0(blocks: Tensor) -> Tensor:
    """[N, 32] fp32 → [N, 34]: d = absmax / 127 as fp16, and columns over d before that, halves away from zero, as ggml does."""
    step = blocks.abs().amax(dim=1, keepdim=True) / 127
    codes = blocks * torch.where(step == 0, 0, 1 / step)
    whole = codes.trunc()
    codes = whole + (2 * (codes - whole)).trunc_()
    return torch.cat([step.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)], dim=1)


def _q6_k(blocks: Tensor) -> Tensor:
    """[N, 256] fp32 → [N, 210]: an fp16 scale, sixteen int8 scales of 16 columns each, and 6 bits a column (−32 … 31).

    Byte m of half h of `low` holds the low four bits of columns 128h + m and 128h + 64 + m (m < 64); byte m of half h of
    `high` the upper two bits of columns 128h + m, + 32, + 64 and + 96 (m < 32).
    """
    parts = blocks.reshape(-1, 16, 16)
    extreme = parts.gather(2, parts.abs().argmax(dim=2, keepdim=True))[..., 0] / -32  # [N, 16]; its code is −32
    whole = (extreme.abs().amax(dim=1, keepdim=True) / 127).half()  # [N, 1]
    step = torch.where(whole == 0, torch.zeros(()), 1 / whole.float())
    scales = (extreme * step).round_().clamp_(-127, 127)
    width = scales * whole.float()
    inverse = torch.where(width == 0, torch.zeros(()), 1 / width)[..., None]
    codes = ((parts * inverse).round_().clamp_(-32, 31) + 32).to(torch.uint8).reshape(-1, 2, 128)
    quarters = codes.reshape(-1, 2, 4, 32)
    low = (codes[..., :64] & 15) | (codes[..., 64:] & 15) << 4
    high = quarters[:, :, 0] >> 4 | quarters[:, :, 1] >> 4 << 2 | quarters[:, :, 2] >> 4 << 4 | quarters[:, :, 3] >> 4 << 6
    return torch.cat([low.flatten(1), high.flatten(1), scales.to(torch.int8).view(torch.uint8), whole.view(torch.uint8)], dim=1)
