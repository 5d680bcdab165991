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


PANEL_ROWS, BLOCK_ROWS, PER_LANE = 32, 16, 4


class PanelTwoBit:
    """The CPU kernels' own, 2 bits a weight: panels of 32 rows, each one sequential stream of 128-byte tiles.

    A tile is 16 columns of two blocks of 16 rows. Bits 2i…2i+1 of byte j of lane r of block b hold row 16b + r, column
    4i + j. Any shape: rows and columns that are missing, also at the end of a group, hold code 0.
    """

    COLUMNS = 16

    @staticmethod
    def pack(codes: Tensor, group: int = 0) -> Tensor:
        """[O, K] int8 → [bytes] uint8. group: columns that share a scale; 0: all of them."""
        symbols = _panels(codes, group, PanelTwoBit.COLUMNS)
        return (symbols[0] | symbols[1] << 2 | symbols[2] << 4 | symbols[3] << 6).flatten()

    @staticmethod
    def unpack(packed: Tensor, outputs: int, inputs: int, group: int = 0) -> Tensor:
        """[bytes] uint8 → [O, K] int8."""
        symbols = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])
        return _rows(symbols, outputs, inputs, group, PanelTwoBit.COLUMNS)


class PanelBase3:
    """As PanelTwoBit with five symbols a byte, 1.6 bits a weight.

    A tile is 20 columns. Byte j of a lane is Σ_i 3^i · symbol of column 4i + j, i = 0 … 4.
    """

    COLUMNS = 20

    @staticmethod
    def pack(codes: Tensor, group: int = 0) -> Tensor:
        """[O, K] int8 → [bytes] uint8. group: columns that share a scale; 0: all of them."""
        symbols = _panels(codes, group, PanelBase3.COLUMNS)
        return (symbols[0] + 3 * symbols[1] + 9 * symbols[2] + 27 * symbols[3] + 81 * symbols[4]).flatten()

    @staticmethod
    def unpack(packed: Tensor, outputs: int, inputs: int, group: int = 0) -> Tensor:
        """[bytes] uint8 → [O, K] int8."""
        symbols = torch.stack([packed // power % 3 for power in (1, 3, 9, 27, 81)])
        return _rows(symbols, outputs, inputs, group, PanelBase3.COLUMNS)


def _panels(codes: Tensor, group: int, width: int) -> Tensor:
    """[O, K] → symbols [width/4, panels, tiles, 2, 16, 4] uint8, every group padded to whole tiles."""
    parts = codes.split(group or codes.shape[1], dim=1)
    padded = torch.cat([torch.nn.functional.pad(part, (0, -part.shape[1] % width)) for part in parts], dim=1)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, -codes.shape[0] % PANEL_ROWS))
    blocks = (padded + 1).to(torch.uint8).reshape(-1, 2, BLOCK_ROWS, padded.shape[1] // width, width // PER_LANE, PER_LANE)
    return blocks.permute(4, 0, 3, 1, 2, 5)


def _rows(symbols: Tensor, outputs: int, inputs: int, group: int, width: int) -> Tensor:
    """The inverse of _panels: [width/4, bytes] → [O, K] int8."""
    columns = [min(group or inputs, inputs - start) for start in range(0, inputs, group or inputs)]
    tiles = sum(-(-n // width) for n in columns)
    blocks = symbols.reshape(width // PER_LANE, -1, tiles, 2, BLOCK_ROWS, PER_LANE).permute(1, 3, 4, 2, 0, 5)
    padded = blocks.reshape(-1, tiles * width).to(torch.int8) - 1
    parts = padded.split([n + -n % width for n in columns], dim=1)
    return torch.cat([part[:outputs, :n] for part, n in zip(parts, columns, strict=True)], dim=1)
