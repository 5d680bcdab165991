"""The native CPU kernels (native/, a plain C library) on torch tensors, through ctypes.

    pack once        codes [O, K] int8 ──▶ PackedMatrix      `two-bit` 2 bits a weight, `base-3` 1.6, `int8` 8
    then             x ──quantize──▶ codes [T, K], s_x [T, 1] ──linear──▶ y = (Σ code_x · code_w) · (s_x · s_w) + b

Integer products are exact and `linear` has the bits of quant.integer_linear, whatever the instruction set; `quantize` has
those of quant.int8_codes, and with a norm differs from them by the order of one sum.

The library is a file beside this one (an installed wheel), or in a checkout build/native/<hash of its sources>/, where
`python -m trilobit.kernels.build` puts it. Where neither exists `available()` is false and torch computes everything.
Nothing is looked for, loaded or asked of the processor before the first call.

Letters: O outputs, K inputs, T tokens, G groups of a row.
"""

import ctypes
import mmap
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trilobit import quant
from trilobit.errors import ConfigError
from trilobit.kernels import build
from trilobit.quant import Granularity

Format = Literal["two-bit", "base-3", "int8"]
FORMATS: dict[str, int] = {"two-bit": 0, "base-3": 1, "int8": 2}
ABI = 3
BEST = -1


@dataclass(frozen=True)
class Instructions:
    """An instruction set's name and the reason it was chosen, in words for the user."""

    name: str
    reason: str


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix in a native layout: data [bytes] uint8; group: columns per scale, or 0 for a scale per matrix or row."""

    data: Tensor
    rows: int
    columns: int
    group: int
    format: Format


class _Matrix(Structure):
    _fields_ = [
        ("packed", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("group", c_int64),
        ("format", c_int32),
    ]


# Result type and argument types of trilobit.h.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "abi": (c_int32, []),
    "set_count": (c_int32, []),
    "set_name": (c_char_p, [c_int32]),
    "set_runs_here": (c_int32, [c_int32]),
    "best_set": (c_int32, []),
    "packed_bytes": (c_int64, [c_int32, c_int64, c_int64, c_int64]),
    "pack": (c_int32, [c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p]),
    "unpack": (c_int32, [POINTER(_Matrix), c_void_p]),
    "product": (c_int32, [POINTER(_Matrix), c_void_p, c_int64, c_void_p, c_int32, c_int32]),
    "linear": (
        c_int32,
        [POINTER(_Matrix), c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32],
    ),
    "quantize": (
        c_int32,
        [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_float, c_void_p, c_void_p, c_int32, c_int32],
    ),
    "read": (c_int32, [c_void_p, c_int64, c_int32, c_int32]),
    # engine.h, called by kernels/engine.py
    "session_new": (c_void_p, [c_void_p, c_int64, c_int64, c_int32, c_int64, c_void_p]),
    "session_free": (None, [c_void_p]),
    "session_bytes": (c_int64, [c_void_p]),
    "forward": (
        c_int32,
        [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32],
    ),
    "sample": (c_int32, [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p]),
}
_STATUS = {
    -1: "a size below 1, or more columns than int32 sums hold",
    -2: "no such format",
    -3: "no such instruction set here",
    -4: "a number of scales or gains that fits no granule",
    -5: "no memory",
}

_chosen: int = BEST


class _Library:
    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self.path = path
        self.functions: dict[str, Callable[..., Any]] = {}
        abi = library.trilobit_abi()
        assert abi == ABI, f"{path} has ABI {abi}, not {ABI}"
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"trilobit_{name}")
            function.restype, function.argtypes = result, arguments
            self.functions[name] = function
        names = [self.functions["set_name"](i).decode() for i in range(self.functions["set_count"]())]
        self.sets = {name: i for i, name in enumerate(names) if self.functions["set_runs_here"](i)}

    def call(self, name: str, *arguments: Any) -> int:
        status = self.functions[name](*arguments)
        assert status >= 0, f"trilobit_{name}: {_STATUS.get(status, status)}"
        return status


@cache
def _library() -> _Library | None:
    path = build.find_library()
    return None if path is None else _Library(path)


def _loaded() -> _Library:
    library = _library()
    assert library is not None, "no native library: ask available() first"
    return library


def available() -> bool:
    """Whether the native library is there and loads."""
    return _library() is not None


def instruction_sets() -> list[str]:
    """Those the library has and this processor runs, slowest first; none without the library."""
    library = _library()
    return [] if library is None else list(library.sets)


def choice() -> Instructions:
    """The instruction set in use, and why."""
    library = _library()
    if library is None:
        return Instructions("none", f"no native library: {build.why_not()}")
    if _chosen != BEST:
        return Instructions(_name(_chosen), "set by set_instruction_set")
    best = library.functions["best_set"]()
    return Instructions(_name(best), f"the fastest of {', '.join(library.sets)}, which this processor has")


def _name(number: int) -> str:
    return next(name for name, i in _loaded().sets.items() if i == number)


def set_instruction_set(name: str | None) -> None:
    """Use one instruction set from now on; None: the best again. Raises ConfigError with those that exist."""
    global _chosen
    _chosen = BEST if name is None else _number(name)


def _number(name: str | None) -> int:
    if name is None:
        return _chosen
    sets = instruction_sets()
    if name not in sets:
        raise ConfigError(f"instruction set {name} does not exist here: choose one of {', '.join(sets) or 'none'}.")
    return _loaded().sets[name]


def packed_bytes(format: Format, rows: int, columns: int, group: int = 0) -> int:
    """Bytes of the packed form of a [rows, columns] matrix."""
    return _loaded().call("packed_bytes", FORMATS[format], rows, columns, group)


def pack(codes: Tensor, format: Format, granularity: Granularity = "tensor") -> PackedMatrix:
    """codes [O, K] int8 (−1, 0, 1; −128 … 127 for `int8`) in a native layout."""
    codes = _checked(codes, torch.int8, 2).contiguous()
    rows, columns = codes.shape
    group = quant.group_size(granularity) or 0
    data = torch.empty(packed_bytes(format, rows, columns, group), dtype=torch.uint8)
    _loaded().call("pack", FORMATS[format], rows, columns, group, codes.data_ptr(), data.data_ptr())
    return PackedMatrix(data, rows, columns, group, format)


def unpack(matrix: PackedMatrix) -> Tensor:
    """The codes [O, K] int8 again."""
    codes = torch.empty(matrix.rows, matrix.columns, dtype=torch.int8)
    _loaded().call("unpack", _reference(matrix), codes.data_ptr())
    return codes


def product(matrix: PackedMatrix, x: Tensor, instructions: str | None = None, threads: int | None = None) -> Tensor:
    """Σ_k x[t, k] · code[o, k]: x [T, K] int8 → [T, O] int32, exact."""
    x = _activations(matrix, x)
    y = torch.empty(x.shape[0], matrix.rows, dtype=torch.int32)
    arguments = (_number(instructions), _threads(threads))
    _loaded().call("product", _reference(matrix), x.data_ptr(), x.shape[0], y.data_ptr(), *arguments)
    return y


def linear(
    matrix: PackedMatrix, weight_scale: Tensor, x: Tensor, x_scale: Tensor, bias: Tensor | None = None,
    instructions: str | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """quant.integer_linear to the last bit, in fp32.

    weight_scale: fp32, [1, 1], [O, 1], or with groups [G, O] (transposed: one group's scales lie together); x: [T, K] int8;
    x_scale: [T, 1] or [T] fp32; bias: [O] fp32 or None. Returns [T, O] fp32.
    """
    x, x_scale = _activations(matrix, x), x_scale.contiguous()
    assert x_scale.dtype == torch.float32 and x_scale.numel() == x.shape[0], (x_scale.dtype, x_scale.shape, x.shape)
    weight_scale = weight_scale.contiguous()
    assert weight_scale.dtype == torch.float32, weight_scale.dtype
    groups = -(-matrix.columns // matrix.group) if matrix.group else 0
    expected = [(groups, matrix.rows)] if groups else [(1, 1), (matrix.rows, 1)]
    assert tuple(weight_scale.shape) in expected, (tuple(weight_scale.shape), expected)
    if bias is not None:
        bias = _checked(bias, torch.float32, 1).contiguous()
        assert bias.numel() == matrix.rows, (bias.shape, matrix.rows)
    y = torch.empty(x.shape[0], matrix.rows)
    _loaded().call(
        "linear", _reference(matrix), weight_scale.data_ptr(), weight_scale.numel(), x.data_ptr(), x_scale.data_ptr(),
        x.shape[0], None if bias is None else bias.data_ptr(), y.data_ptr(), _number(instructions), _threads(threads),
    )  # fmt: skip
    return y


def quantize(
    x: Tensor, gain: Tensor | None = None, eps: float = 0.0, instructions: str | None = None, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Codes [T, K] int8 and scales [T, 1] fp32 of x [T, K] fp32 or bf16, after an RMSNorm where there is a gain ([K] or [1]).

    Without a gain, quant.int8_codes to the last bit; with one, that of quant.rms_norm(x.float(), gain, eps) but for the
    order in which squares are added.
    """
    assert x.dtype in (torch.float32, torch.bfloat16) and x.ndim == 2 and x.device.type == "cpu", (x.dtype, x.shape, x.device)
    x = x.contiguous()
    tokens, inputs = x.shape
    if gain is not None:
        gain = _checked(gain, torch.float32, 1).contiguous()
        assert gain.numel() in (1, inputs), (gain.shape, inputs)
    codes, scale = torch.empty(tokens, inputs, dtype=torch.int8), torch.empty(tokens, 1)
    _loaded().call(
        "quantize", x.data_ptr(), x.dtype == torch.bfloat16, tokens, inputs, None if gain is None else gain.data_ptr(),
        0 if gain is None else gain.numel(), eps, codes.data_ptr(), scale.data_ptr(), _number(instructions), _threads(threads),
    )  # fmt: skip
    return codes, scale


def read(memory: Tensor, instructions: str | None = None, threads: int | None = None) -> None:
    """Look at every byte of `memory`, for timing it: no product with packed weights is faster."""
    _loaded().call("read", memory.data_ptr(), memory.nbytes, _number(instructions), _threads(threads))


def huge_pages(size: int) -> Tensor:
    """Zero-filled memory [size] uint8, on two-megabyte pages where the system has them: what is read from end to end for
    every token is read a fifth faster there."""
    area = mmap.mmap(-1, max(1, size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)[:size]


def _checked(tensor: Tensor, dtype: torch.dtype, dimensions: int) -> Tensor:
    assert tensor.dtype == dtype and tensor.ndim == dimensions and tensor.device.type == "cpu", (
        (tensor.dtype, tuple(tensor.shape), tensor.device), (dtype, dimensions, "cpu")
    )  # fmt: skip
    return tensor


def _activations(matrix: PackedMatrix, x: Tensor) -> Tensor:
    x = _checked(x, torch.int8, 2).contiguous()
    assert x.shape[1] == matrix.columns, (tuple(x.shape), matrix.columns)
    return x


def _reference(matrix: PackedMatrix) -> Any:
    return ctypes.byref(_Matrix(matrix.data.data_ptr(), matrix.rows, matrix.columns, matrix.group, FORMATS[matrix.format]))


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads
