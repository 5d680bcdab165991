"""Byte layouts of ternary codes: one class each, `pack` and `unpack`, the bits visible as reshape and shift.

A layout knows nothing of scales, names or files. Codes are int8 tensors of −1, 0, 1 and shape [O, K] (outputs, inputs);
stored as symbols 0, 1, 2 in two bits each. docs/formats.md draws them.
"""

import torch
from torch import Tensor

from trilobit.errors import ModelError

PER_BYTE = 4


class Bitnet:
    """transformers' `bitnet`: four output rows a byte, strided.

    With R = O/4, bits 2i…2i+1 of byte [r, k] hold the code of row i·R + r. O must be a multiple of 4.
    """

    @staticmethod
    def fits(outputs: int) -> bool:
        return outputs % PER_BYTE == 0

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        """[O, K] int8 → [O/4, K] uint8. Raises ModelError if O is not a multiple of 4."""
        outputs, inputs = codes.shape
        if not Bitnet.fits(outputs):
            raise ModelError(f"{outputs} output rows are not a multiple of {PER_BYTE}: the bitnet layout cannot hold them.")
        symbols = (codes + 1).to(torch.uint8).reshape(PER_BYTE, outputs // PER_BYTE, inputs)
        return symbols[0] | symbols[1] << 2 | symbols[2] << 4 | symbols[3] << 6

    @staticmethod
    def unpack(packed: Tensor) -> Tensor:
        """[O/4, K] uint8 → [O, K] int8."""
        symbols = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])
        return symbols.reshape(-1, packed.shape[1]).to(torch.int8) - 1


class TwoBit:
    """Our own: four neighbouring inputs a byte; any shape, the last byte of a row padded with code 0.

    Bits 2j…2j+1 of byte [o, b] hold the code of input 4b + j of row o.
    """

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        """[O, K] int8 → [O, ceil(K/4)] uint8."""
        outputs, inputs = codes.shape
        padded = torch.nn.functional.pad(codes, (0, -inputs % PER_BYTE))
        symbols = (padded + 1).to(torch.uint8).reshape(outputs, -1, PER_BYTE)
        return symbols[..., 0] | symbols[..., 1] << 2 | symbols[..., 2] << 4 | symbols[..., 3] << 6

    @staticmethod
    def unpack(packed: Tensor, inputs: int) -> Tensor:
        """[O, ceil(K/4)] uint8 → [O, K] int8."""
        symbols = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
        return (symbols.flatten(1).to(torch.int8) - 1)[:, :inputs].contiguous()
