"""The frozen ternary linear on the native or the GPU kernels: quantiser and product as operators, or the same in torch.

    x [T, K] ──norm, quantize──▶ codes, s_x ──linear──▶ y = (Σ code_x · code_w) · (s_x · s_w) + b        bits of quant.py

Operators of torch.library with fake kernels, so that torch.compile sees shapes and does not look inside. The packed codes
are an operand like any other: who holds the codes holds them too, and packs them once.

Letters: O outputs, K inputs, T tokens, G groups of a row.
"""

import torch
from torch import Tensor

from trilobit import quant
from trilobit.formats import LaneTwoBit
from trilobit.kernels import gpu, native
from trilobit.kernels.dispatch import Choice, int8_choice, integer_linear
from trilobit.quant import Granularity

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result  # the compiler cannot trace the question
def runs_native(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a frozen linear with int8 activations runs on the native kernels, for inputs of a dtype."""
    return device_type == "cpu" and dtype in NATIVE_DTYPES and native.available()


def frozen_choice(device_type: str, dtype: torch.dtype = torch.float32) -> Choice:
    """How a frozen linear with int8 activations is computed, and why."""
    if gpu.available(device_type) and dtype in gpu.DTYPES:
        return Choice(
            "triton", "Triton kernels: two-bit weights, a matrix–vector product up to 16 tokens, int8 tensor cores beyond"
        )
    if runs_native(device_type, dtype):
        return Choice("native", f"native kernels, {native.choice().name}: {native.choice().reason}")
    choice = int8_choice(device_type)
    if device_type != "cpu" or dtype not in NATIVE_DTYPES:
        return choice
    return Choice(choice.name, f"{choice.reason} ({native.choice().reason})")


@torch.compiler.assume_constant_result
def layout(granularity: Granularity) -> native.Format:
    """The denser layout where unpacking it costs nothing: base-3 with VBMI's byte permutation, else two-bit.

    Groups of 64 would fill a fifth of base-3's tiles with padding, which makes them 2 bits as well.
    """
    vbmi = "avx512vbmi" in native.instruction_sets()
    return "base-3" if vbmi and granularity != "group-64" else "two-bit"


def packs(x: Tensor) -> bool:
    """Whether frozen_linear of inputs like x reads packed codes."""
    return gpu.runs_on(x) or runs_native(x.device.type, x.dtype)


def frozen_linear(
    x: Tensor, codes: Tensor, packed: Tensor | None, scale: Tensor, bias: Tensor | None, granularity: Granularity,
    gain: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """quant.integer_linear of quant.int8_codes(x), or of its norm's where there is a gain: [T, K] → [T, O] in x's dtype, which
    fp32 (without a norm float64 for float64) is cast to last. Without a norm the same bits everywhere.

    codes: [O, K] int8; packed: pack_codes(codes) if packs(x), or None for torch; scale as quant.absmean_scale.
    """
    group, dtype, x = quant.group_size(granularity) or 0, x.dtype, x.detach()
    if packed is not None and gpu.runs_on(x):
        levels, x_scale, _ = gpu.norm_quantize(x, gain, eps)
        return gpu.packed_linear(levels, x_scale, packed, scale, bias, group, dtype)
    if gain is not None:
        x = quant.rms_norm(x.float(), gain, eps)
    if packed is not None:
        x = x if x.dtype != torch.float16 else x.float()
        y = torch.ops.trilobit.native_linear(x, packed, scale, bias, codes.shape[0], group, layout(granularity))
        return y.to(dtype)
    levels, x_scale = quant.int8_codes(x)
    return integer_linear(levels, x_scale, codes, scale, bias, granularity).to(dtype)


def pack_codes(codes: Tensor, granularity: Granularity) -> Tensor:
    """codes [O, K] int8 as frozen_linear reads them on their device: LaneTwoBit on a GPU, else the native layout, [bytes]."""
    if gpu.available(codes.device.type):
        return LaneTwoBit.pack(codes)
    return torch.ops.trilobit.native_pack(codes, quant.group_size(granularity) or 0, layout(granularity))


# Library.define rather than custom_op, whose wrapper costs as much as the product of a small matrix.
_operators = torch.library.Library("trilobit", "FRAGMENT")
_operators.define("native_pack(Tensor codes, int group, str format) -> Tensor")
_operators.define(
    "native_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int rows, int group, str format) -> Tensor"
)


@torch.library.impl(_operators, "native_pack", "CPU")
def _pack(codes: Tensor, group: int, format: native.Format) -> Tensor:
    granularity: Granularity = f"group-{group}" if group else "tensor"  # pyright: ignore[reportAssignmentType]
    return native.pack(codes, format, granularity).data


@torch.library.register_fake("trilobit::native_pack", lib=_operators)
def _(codes: Tensor, group: int, format: native.Format) -> Tensor:
    return codes.new_empty(native.packed_bytes(format, codes.shape[0], codes.shape[1], group), dtype=torch.uint8)


@torch.library.impl(_operators, "native_linear", "CPU")
def _linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, group: int, format: native.Format
) -> Tensor:
    codes, x_scale = native.quantize(x)
    matrix = native.PackedMatrix(packed, rows, x.shape[1], group, format)
    return native.linear(matrix, scale.T if group else scale, codes, x_scale, bias)


@torch.library.register_fake("trilobit::native_linear", lib=_operators)
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, group: int, format: native.Format) -> Tensor:
    return x.new_empty(x.shape[0], rows, dtype=torch.float32)
