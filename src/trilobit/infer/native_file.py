"""A native model on disk: one safetensors file whose header is read here and believed only after it is checked.

    8 bytes     length of the header, little endian; the header is padded so that the data begins at a multiple of 64
    header      JSON: each tensor's dtype, shape and place; under __metadata__ what graph.Header holds
    data        packed matrices first, every one a multiple of 128 bytes: their cache lines stay whole; then fp32, fp16, bf16

Reading checks that tensors lie one after another from the first byte of data to the last of the file, with the sizes that
their dtypes and shapes ask for, and that names and shapes are those of the model in the header: nothing in a file decides
what memory is read. Their content is not judged: any byte is a valid code, and a damaged scale gives damaged logits.
"""

import json
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trilobit.errors import ModelError, OutputError
from trilobit.infer.graph import DTYPES, Graph, Header, Piece, Planned, Specs, check
from trilobit.kernels.native import huge_pages

NAME = "native.safetensors"
FORMAT, VERSION = "trilobit-native", "2"
MOST_HEADER_BYTES = 16 << 20  # a tensor takes about a hundred
ALIGNMENT = 64
Memory = Literal["mapped", "copied"]


@torch.no_grad()
def write(model: Graph | Planned, path: Path, each: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write a native file, its tensors made one piece at a time: no more than that is in memory. each: told how many pieces are
    written, and of how many. Raises OutputError where the disk refuses."""
    pieces = model.pieces if isinstance(model, Planned) else [Piece(model.specs, lambda: model.tensors)]
    text, places = _layout(model.header, model.specs)
    try:
        with path.open("wb") as file:
            file.write(text)
            for done, piece in enumerate(pieces, start=1):
                for name, tensor in piece.tensors().items():
                    file.seek(len(text) + places[name])
                    file.write(tensor.view(-1).view(torch.uint8).numpy().data)
                each(done, len(pieces))
    except OSError as error:
        raise OutputError(f"cannot write {path.name}: {error.strerror or error}. Nothing was left behind.") from error


def _layout(header: Header, specs: Specs) -> tuple[bytes, dict[str, int]]:
    """The file's header, and where in the data each tensor begins."""
    order = list(DTYPES)  # so that each begins at a multiple of its size
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, "graph": json.dumps(header.to_json())}}
    places, end = {}, 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        places[name], end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places


def read(path: Path, memory: Memory | None = None) -> Graph:
    """Read a native file. `mapped`: pages come from the file as they are needed; `copied`: into memory on huge pages, which
    is read faster; by default copied where that takes less than a quarter of the memory there is. Raises ModelError.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            entries, start = _header(file, size)
            graph_header = _graph_header(entries.pop("__metadata__", None))
            places = _places(entries, size - start)
            check(graph_header, {name: (dtype, shape) for name, (dtype, shape, _, _) in places.items()})
            data = _data(file, start, size - start, memory)
    except ModelError as error:
        raise ModelError(f"{path} is no native model, or damaged: {error}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    tensors = {name: data[begin:end].view(DTYPES[dtype]).view(shape) for name, (dtype, shape, begin, end) in places.items()}
    return Graph(graph_header, tensors)


def _header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and where the data begins."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MOST_HEADER_BYTES) or (8 + length) % ALIGNMENT:
        raise ModelError("it has no header.")
    try:
        entries = json.loads(file.read(length), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError("its header is not JSON.") from error
    if not isinstance(entries, dict):
        raise ModelError("its header lists nothing.")
    return entries, 8 + length


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _graph_header(metadata: Any) -> Header:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelError("it is another kind of safetensors file.")
    if metadata.get("version") != VERSION:
        found = str(metadata.get("version"))[:20]
        raise ModelError(f"it has version {found}, this program reads version {VERSION}: export the model again.")
    try:
        return Header.from_json(json.loads(metadata["graph"], parse_constant=_no_constant))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError("its header does not describe a model.") from error


def _places(entries: dict[str, Any], room: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Dtype, shape, begin and end of each tensor, which must fill the data without holes or overlaps."""
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sizes = [*shape, begin, end]
            right = dtype in DTYPES and type(shape) is list and len(shape) <= 2
            right = right and all(type(n) is int and 0 <= n < 1 << 48 for n in sizes) and begin % DTYPES[dtype].itemsize == 0
        except (KeyError, TypeError, ValueError):
            right = False
            dtype, shape, begin, end = "", [], 0, 0
        if not right or end - begin != DTYPES[dtype].itemsize * int(np.prod(shape, dtype=object)):
            raise ModelError(f"its header says of the tensor {name[:80]!r} what cannot be.")
        found[name] = dtype, tuple(shape), begin, end
    at = 0
    for name, (_, _, begin, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise ModelError(f"its tensors overlap or leave holes, at {name[:80]!r}.")
        at = end
    if at != room:
        raise ModelError(f"its tensors take {at} bytes, and the file holds {room}.")
    return found


def _data(file: Any, start: int, size: int, memory: Memory | None) -> Tensor:
    """The file's data, [size] uint8, aligned to a cache line."""
    if memory is None:
        memory = "copied" if size < _memory_bytes() // 4 else "mapped"
    if memory == "mapped":
        area = mmap.mmap(file.fileno(), start + size, access=mmap.ACCESS_COPY)
        return torch.frombuffer(area, dtype=torch.uint8)[start:]
    data = huge_pages(size)
    view: Any = data.numpy()
    file.seek(start)
    done = 0
    while done < size:
        if not (count := file.readinto(view[done:size])):
            raise ModelError("it ends before its data does.")
        done += count
    return data


def _memory_bytes() -> int:
    """Memory of this machine, or a gigabyte where it cannot be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 30
