"""Tensors on disk: safetensors files with one tensor in memory at a time, and what tells one set of weights from another."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trilobit.errors import OutputError
from trilobit.storage import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MOST_BYTES = 5_000_000_000  # of a file, as hubs like it
_DTYPES = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.uint8": "U8", "torch.int8": "I8",
    "torch.int32": "I32", "torch.int64": "I64",
}  # fmt: skip


def weights_fingerprint(model: "nn.Module") -> str:
    """`fingerprint` of every parameter. Of a model in parts, put together a tensor at a time, every rank has to ask."""
    return fingerprint((name, whole(parameter)) for name, parameter in model.named_parameters())


def fingerprint(tensors: "Iterable[tuple[str, Tensor]]") -> str:
    """SHA-256 of every tensor's name, dtype, shape and bytes, which no device and no number of threads changes."""
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def whole(tensor: "Tensor") -> "Tensor":
    """All rows of a parameter, gathered if it is a DTensor: then every rank has to ask."""
    held: Any = tensor.detach()
    return held.full_tensor() if hasattr(held, "full_tensor") else held


def save_tensors(tensors: "dict[str, Tensor]", path: Path) -> None:
    """Write a safetensors file. Raises OutputError where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"cannot write {path.name}: {error}. Nothing was left behind.") from error


@dataclass(frozen=True)
class Entry:
    """A tensor to be stored, and how to get it when its turn comes."""

    name: str
    dtype: "torch.dtype"
    shape: tuple[int, ...]
    read: Callable[[], "Tensor"]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stream_tensors(
    entries: list[Entry],
    directory: Path,
    stem: str = "model",
    most: int = MOST_BYTES,
    each: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write entries as STEM.safetensors with one tensor in memory at a time; as several files with an index where they hold
    more than `most` bytes. each: told how many are written, and of how many. Raises OutputError where the disk refuses."""
    import torch

    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > most:
            shards.append([])
        shards[-1].append(entry)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        size = sum(entry.bytes for entry in entries)
        write_json(directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    written = 0
    for name, shard in zip(names, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in shard:
            header[entry.name] = {
                "dtype": _DTYPES[str(entry.dtype)], "shape": list(entry.shape), "data_offsets": [start, start + entry.bytes],
            }  # fmt: skip
            start += entry.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        try:
            with (directory / name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for entry in shard:
                    tensor = entry.read().detach().to("cpu", entry.dtype).contiguous()
                    assert tensor.shape == entry.shape, (entry.name, tensor.shape, entry.shape)
                    data: Any = tensor.view(-1).view(torch.uint8).numpy()
                    file.write(data.data)  # not tofile, which does not notice that the disk is full for the last bytes
                    del tensor, data  # else two would be in memory while the next one is read
                    written += 1
                    each(written, len(entries))
        except OSError as error:
            raise OutputError(f"cannot write {name}: {error.strerror or error}. Nothing was left behind.") from error
