"""Byte layouts of ternary codes, and one of wider ones: a class each, `pack` and `unpack`, bits visible as reshape and shift.

A layout knows nothing of names or files; those of GGUF hold the scales too, an fp16 in every block. Codes are int8 tensors
of −1, 0, 1 and shape [O, K] (outputs, inputs), stored as symbols 0, 1, 2. docs/formats.md draws them.
"""

import torch
from torch import Tensor

from trilobit.errors import ModelError

PER_BYTE = 4
CHUNK = 1 << 18  # codes that are packed at a time


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


class LaneTwoBit:
    """The GPU kernels' own: row by row, 16 inputs a lane of four bytes; any shape, rows padded with code 0 to whole lanes.

    Bits 2i…2i+1 of byte 4q + j of a row hold the code of input 16q + 4i + j. As a little-endian 32-bit word, a lane shifted by
    2i bits and masked with 0x03030303 is four neighbouring symbols, one a byte: what dp4a multiplies by four activations.
    """

    COLUMNS = 16

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        """[O, K] int8 → [O, 4 · ceil(K/16)] uint8."""
        outputs, inputs = codes.shape
        padded = torch.nn.functional.pad(codes, (0, -inputs % LaneTwoBit.COLUMNS))
        symbols = (padded + 1).to(torch.uint8).reshape(outputs, -1, 4, PER_BYTE)  # lane, i, j
        return (symbols[:, :, 0] | symbols[:, :, 1] << 2 | symbols[:, :, 2] << 4 | symbols[:, :, 3] << 6).flatten(1)

    @staticmethod
    def unpack(packed: Tensor, inputs: int) -> Tensor:
        """[O, 4 · ceil(K/16)] uint8 → [O, K] int8."""
        lanes = packed.reshape(packed.shape[0], -1, PER_BYTE)
        symbols = torch.stack([lanes >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
        return (symbols.flatten(1).to(torch.int8) - 1)[:, :inputs].contiguous()


PANEL_ROWS, BLOCK_ROWS, PER_LANE = 32, 16, 4


class PackQuantized:
    """compressed-tensors' `pack-quantized`: 32/b neighbouring inputs of 2, 4 or 8 bits an int32, a row's last padded.

    Bits bj…bj+b−1 of word [o, w] hold level + 2^(b−1) of input 32/b · w + j of row o. (Widths that do not divide 32 are
    laid out in other ways by other versions of the package.)
    """

    BITS = (2, 4, 8)

    @staticmethod
    def pack(levels: Tensor, bits: int) -> Tensor:
        """[O, K] int8 in −2^(b−1) … 2^(b−1) − 1 → [O, ceil(K b/32)] int32."""
        assert bits in PackQuantized.BITS, bits
        outputs, inputs = levels.shape
        symbols = (levels.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
        symbols = torch.nn.functional.pad(symbols, (0, -inputs % (32 // bits))).reshape(outputs, -1, 8 // bits)
        packed = symbols[..., 0].clone()
        for place in range(1, 8 // bits):
            packed |= symbols[..., place] << bits * place
        return packed.view(torch.int32)

    @staticmethod
    def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
        """[O, ceil(K b/32)] int32 → [O, K] int8."""
        assert bits in PackQuantized.BITS, bits
        symbols = torch.stack([packed.view(torch.uint8) >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-1)
        return (symbols.flatten(1).to(torch.int16) - (1 << bits - 1)).to(torch.int8)[:, :inputs].contiguous()


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


class GgufBlocks:
    """A ternary type of GGUF: a row is K / BLOCK blocks of SIZE bytes, each with symbols and one fp16 scale.

    K must be a multiple of BLOCK. TYPE is ggml's number for it.
    """

    TYPE: int
    BLOCK: int
    SIZE: int

    @classmethod
    def fits(cls, inputs: int) -> bool:
        return inputs % cls.BLOCK == 0

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor) -> Tensor:
        """[O, K] int8, [O, K / BLOCK] (rounded to fp16) → [O, bytes] uint8. Raises ModelError if K is no multiple of BLOCK, or
        if fp16 has no such scale."""
        outputs, inputs = codes.shape
        if not cls.fits(inputs):
            raise ModelError(f"{inputs} columns are not a multiple of {cls.BLOCK}: {cls.__name__} cannot hold them.")
        halves = scales.to(torch.float16)
        if not bool(torch.isfinite(halves).all()) or bool(((halves == 0) & (scales != 0)).any()):
            raise ModelError(f"{cls.__name__} has fp16 scales, and this matrix needs one of {scales.abs().max().item():.3g}.")
        blocks, ends = codes.reshape(-1, cls.BLOCK), halves.reshape(-1, 1).contiguous().view(torch.uint8)
        packed = torch.empty(len(blocks), cls.SIZE, dtype=torch.uint8, device=codes.device)
        for start in range(0, len(blocks), CHUNK // cls.BLOCK):  # what lies between stays in the cache
            part = slice(start, start + CHUNK // cls.BLOCK)
            packed[part] = cls._join((blocks[part] + 1).to(torch.uint8), ends[part])
        return packed.reshape(outputs, -1)

    @classmethod
    def unpack(cls, packed: Tensor) -> tuple[Tensor, Tensor]:
        """[O, bytes] uint8 → codes [O, K] int8, scales [O, K / BLOCK] fp16."""
        outputs = packed.shape[0]
        symbols, halves = cls._split(packed.reshape(-1, cls.SIZE))
        codes = (symbols.to(torch.int8) - 1).reshape(outputs, -1)
        return codes, halves.contiguous().view(torch.float16).reshape(outputs, -1)

    @staticmethod
    def _join(symbols: Tensor, halves: Tensor) -> Tensor:
        """[N, BLOCK] uint8, [N, 2] uint8 → [N, SIZE]."""
        raise NotImplementedError

    @staticmethod
    def _split(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of _join."""
        raise NotImplementedError


class Q2_0(GgufBlocks):
    """ggml's Q2_0: 64 columns, the scale first. Bits 2j…2j+1 of byte b hold column 4b + j. 2.25 bits a weight."""

    TYPE, BLOCK, SIZE = 42, 64, 18

    @staticmethod
    def _join(symbols: Tensor, halves: Tensor) -> Tensor:
        four = symbols.reshape(len(symbols), -1, PER_BYTE)
        return torch.cat([halves, four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6], dim=1)

    @staticmethod
    def _split(blocks: Tensor) -> tuple[Tensor, Tensor]:
        symbols = torch.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
        return symbols.flatten(1), blocks[:, :2]


class Q2_0Of128(Q2_0):
    """PrismML's Q2_0: the same with 128 columns a block, under the same number. Only told apart by a tensor's size."""

    BLOCK, SIZE = 128, 34


class TQ2_0(GgufBlocks):
    """ggml's TQ2_0: 256 columns, the scale last. 2.0625 bits a weight.

    Bits 2l…2l+1 of byte 32g + m hold column 128g + 32l + m.
    """

    TYPE, BLOCK, SIZE = 35, 256, 66

    @staticmethod
    def _join(symbols: Tensor, halves: Tensor) -> Tensor:
        s = symbols.reshape(len(symbols), 2, 4, 32)
        return torch.cat([(s[:, :, 0] | s[:, :, 1] << 2 | s[:, :, 2] << 4 | s[:, :, 3] << 6).flatten(1), halves], dim=1)

    @staticmethod
    def _split(blocks: Tensor) -> tuple[Tensor, Tensor]:
        stored = blocks[:, :64].reshape(-1, 2, 32)
        return torch.stack([stored >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1), blocks[:, 64:]


class TQ1_0(GgufBlocks):
    """ggml's TQ1_0: 256 columns, the scale last. Five symbols a byte, the first the most significant, v = Σ 3^(4−n) · symbol n,
    stored as ceil(256 v / 243), so that multiplying by 3 pushes them out one by one. Byte m of the first 32 holds columns
    32n + m, byte m of the next 16 columns 160 + 16n + m; byte m of the last 4 has four, 240 + 4n + m. 1.6875 bits a weight."""

    TYPE, BLOCK, SIZE = 34, 256, 54
    PARTS = ((32, 5), (16, 5), (4, 4))  # bytes, symbols in each

    @staticmethod
    def _join(symbols: Tensor, halves: Tensor) -> Tensor:
        parts, start = [], 0
        for size, count in TQ1_0.PARTS:
            digits = symbols[:, start : start + size * count].reshape(-1, count, size).to(torch.int32)
            powers = torch.tensor([3 ** (4 - n) for n in range(count)], dtype=torch.int32, device=symbols.device)
            value = (digits * powers[:, None]).sum(dim=1, dtype=torch.int32)
            parts.append(((value * 256 + 242) // 243).to(torch.uint8))
            start += size * count
        return torch.cat([*parts, halves], dim=1)

    @staticmethod
    def _split(blocks: Tensor) -> tuple[Tensor, Tensor]:
        parts, start = [], 0
        for size, count in TQ1_0.PARTS:
            stored = blocks[:, start : start + size].to(torch.int32)
            parts += [(stored * 3**n & 255) * 3 >> 8 for n in range(count)]
            start += size
        return torch.cat(parts, dim=1).to(torch.uint8), blocks[:, start:]
