"""A GGUF file, believed only after it is checked: its metadata, and where each tensor lies.

    magic, version 3 (or 2), number of tensors, number of keys            little endian throughout
    keys       name, type, value (number, bool, text, or list of those)
    tensors    name, dimensions (fastest first), type, offset
    data       from the next multiple of the alignment; each tensor at a multiple of it, one directly after another

Nothing is read before its length is known to lie in the file, nothing is allocated that the file has no bytes for, and the
numbers of keys, items and tensors are bounded, so that a hostile header costs a second at most. Tensors must fill the data
one after another in the order they are listed, as llama.cpp asks, too: that leaves no overlaps and no holes, and it tells
the two layouts apart that share type 42 (formats.Q2_0, Q2_0Of128): only one of them fills the file.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from trilobit.errors import ModelError
from trilobit.formats import Q2_0, TQ1_0, TQ2_0, GgufBlocks, Q2_0Of128

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_KEYS, MOST_ITEMS, MOST_TENSORS = 1 << 12, 1 << 21, 1 << 15
MOST_NAME, MOST_TEXT, MOST_HEADER = 1 << 10, 16 << 20, 512 << 20  # bytes
MOST_ELEMENTS, MOST_DIMENSIONS, MOST_ALIGNMENT = 1 << 40, 4, 1 << 16
ALIGNMENT = 32

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
# Type: name, elements a block, bytes a block. Ternary ones have their classes.
PLAIN = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
QUANTIZED = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
TERNARY: dict[int, type[GgufBlocks]] = {form.TYPE: form for form in (TQ1_0, TQ2_0, Q2_0)}
UNPORTABLE = {36: "I2_S", 38: "TL1", 39: "TL2"}  # bitnet.cpp's; the numbers of its fork


@dataclass(frozen=True)
class Place:
    """A tensor in the file. shape: [rows, columns], or [columns]; ternary: its layout, None if it has another type."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    size: int
    ternary: type[GgufBlocks] | None


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key, and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Place]

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor."""
        place = self.tensors[name]
        try:
            with self.path.open("rb") as file:
                file.seek(place.begin)
                data = bytearray(file.read(place.size))
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if len(data) != place.size:
            raise ModelError(f"{self.path} has become shorter while it was read.")
        return torch.frombuffer(data, dtype=torch.uint8)

    def ternary(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes [O, K] int8 and scales [O, G] fp32, none negative, of a tensor with a ternary layout."""
        place = self.tensors[name]
        assert place.ternary is not None, name
        codes, halves = place.ternary.unpack(self.read(name).reshape(place.shape[0], -1))
        scales = halves.float()
        if not bool(torch.isfinite(scales).all()):
            raise ModelError(f"{self.path}: a scale of {name} is not finite: it is damaged.")
        if int(codes.max()) > 1:
            raise ModelError(f"{self.path}: {name} has weights of a fourth level, +2 scales: it is not ternary, or damaged.")
        if bool((scales < 0).any()):
            signs = torch.where(scales < 0, -1, 1).to(torch.int8)
            codes = codes * signs.repeat_interleave(place.ternary.BLOCK, dim=1)
        return codes, scales.abs()

    def dense(self, name: str) -> Tensor:
        """A tensor as fp32, whatever it is stored as."""
        place = self.tensors[name]
        if place.ternary is not None:
            codes, scales = self.ternary(name)
            return codes.float() * scales.repeat_interleave(place.ternary.BLOCK, dim=1)
        data = self.read(name)
        if place.kind in PLAIN:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[PLAIN[place.kind][0]]
            return data.view(dtype).float().view(place.shape)
        try:
            import gguf
        except ImportError as error:
            raise ModelError(
                f"{self.path}: {name} is {QUANTIZED[place.kind][0]}, which needs the package gguf: pip install gguf."
            ) from error
        values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(place.kind))
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(place.shape)


def open_gguf(path: Path) -> GgufFile:
    """Read and check a header. Raises ModelError that says what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            metadata, entries, end = _Header(file, size).read()
            tensors = _places(entries, _alignment(metadata), end, size)
    except ModelError as error:
        raise ModelError(f"{path} is no GGUF file that can be read, or damaged: {error}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    return GgufFile(path, metadata, tensors)


class _Header:
    """A header as it is read: never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left, self.at, self.items = file, min(size, MOST_HEADER), 0, 0

    def read(self) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
        """Metadata, what is said of each tensor (name, shape, type, offset), and where the header ends."""
        if self.take(4) != MAGIC:
            raise ModelError("it does not begin with GGUF.")
        version = self.number("I")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            raise ModelError("it is big-endian." if big else f"it has version {version}, this program reads 2 and 3.")
        tensors, keys = self.number("Q"), self.number("Q")
        if keys > MOST_KEYS or tensors > MOST_TENSORS:
            raise ModelError(f"it says that it has {keys} keys and {tensors} tensors.")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self.name()
            if name in metadata:
                raise ModelError(f"it has the key {name!r} twice.")
            metadata[name] = self.value(self.number("I"))
        return metadata, [self.tensor() for _ in range(tensors)], self.at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ModelError("its header goes on past the end of the file.")
        data = self.file.read(count)
        if len(data) != count:
            raise ModelError("its header goes on past the end of the file.")
        self.left -= count
        self.at += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def name(self) -> str:
        name = self.text(MOST_NAME)
        if not name or not name.isprintable():
            raise ModelError(f"it has a name {name[:80]!r}.")
        return name

    def text(self, most: int = MOST_TEXT) -> str:
        length = self.number("Q")
        if length > most:
            raise ModelError(f"it has a text of {length} bytes.")
        data = self.take(length)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data.decode(errors="replace")  # published vocabularies have pieces of characters

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number("B") != 0 if NUMBERS[kind] == "?" else self.number(NUMBERS[kind])
        if kind != LIST:
            raise ModelError(f"it has a value of type {kind}.")
        inner, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MOST_ITEMS:
            raise ModelError(f"it has a list of {count} items.")
        if inner == TEXT:
            return [self.text() for _ in range(count)]
        if inner not in NUMBERS:
            raise ModelError(f"it has a list of type {inner}.")
        code = NUMBERS[inner].replace("?", "B")
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.name(), self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ModelError(f"its tensor {name!r} has {dimensions} dimensions.")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        if min(shape) < 1 or math.prod(shape) > MOST_ELEMENTS:
            raise ModelError(f"its tensor {name!r} has the shape {list(shape)}.")
        return name, shape, self.number("I"), self.number("Q")


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise ModelError(f"its alignment is {str(alignment)[:40]}, which is no power of two up to {MOST_ALIGNMENT}.")
    return alignment


def _places(entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int, end: int, size: int) -> dict[str, Place]:
    """Where the tensors lie, by the layout of type 42 that fills the file. Raises ModelError if neither or both do."""
    start = end + -end % alignment
    found, faults = [], []
    layouts = (Q2_0, Q2_0Of128) if any(kind == Q2_0.TYPE for _, _, kind, _ in entries) else (Q2_0,)
    for layout in layouts:
        try:
            found.append(_laid_out(entries, alignment, start, size, {**TERNARY, Q2_0.TYPE: layout}))
        except ModelError as error:
            faults.append(error)
    if not found:
        raise faults[0]
    if len(found) > 1:
        raise ModelError("its matrices are too small to tell whether a block of its type 42 (Q2_0) has 64 or 128 columns.")
    return found[0]


def _laid_out(
    entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int, start: int, size: int,
    ternary: dict[int, type[GgufBlocks]],
) -> dict[str, Place]:  # fmt: skip
    places: dict[str, Place] = {}
    offset = last = 0
    for name, shape, kind, stated in entries:
        layout = ternary.get(kind)
        if layout is not None and len(shape) == 2:
            block, bytes_a_block = layout.BLOCK, layout.SIZE
        elif kind in PLAIN or kind in QUANTIZED:
            _, block, bytes_a_block = (PLAIN | QUANTIZED)[kind]
        else:
            raise ModelError(f"its tensor {name!r} has type {kind}{_advice(kind)}.")
        if shape[-1] % block:
            raise ModelError(f"its tensor {name!r} has rows of {shape[-1]}, which are no whole blocks of {block}.")
        if name in places:
            raise ModelError(f"it has the tensor {name!r} twice.")
        length = math.prod(shape) // block * bytes_a_block
        if stated != offset or start + offset + length > size:
            raise ModelError(
                f"its tensor {name!r} of {length} bytes is at {stated}, where the one before it ends at {offset} and the file "
                f"at {size - start}."
            )
        places[name] = Place(shape, kind, start + offset, length, layout)
        last, offset = offset + length, offset + length + -length % alignment
    if size - start not in (last, offset):
        raise ModelError(f"its data ends at {last}, the file at {size - start}: there is something that no tensor is.")
    return places


def _advice(kind: int) -> str:
    if kind in UNPORTABLE:
        return f" ({UNPORTABLE[kind]}, bitnet.cpp's, which differs between processors): take the model's HF checkpoint"
    return ", which is not read"
