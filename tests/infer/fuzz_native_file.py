"""Damaged native files, without end: each is refused with a ModelError or runs. `python tests/infer/fuzz_native_file.py
[seconds] [seed]`; a file that does neither is left in the temporary folder that is named, and the exit code is 1.

Damage comes to bytes (flips, runs, truncation, splices from elsewhere in the file) and to what the header says (values
replaced, moved, swapped, removed, added): the second kind is what gets past the first checks.
"""

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

import torch

from infer.natives import frozen
from trilobit.errors import ModelError
from trilobit.infer import compiler, graph, native_file
from trilobit.infer.engine import Engine
from trilobit.kernels.engine import Sampling

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 20, "vocab_size": 30, "head_dim": 6}
ODD: list[Any] = [
    0, 1, -1, 2, 3, 63, 64, 127, 255, 256, 1 << 16, (1 << 20) - 1, 1 << 20, (1 << 24) - 1, (1 << 31) - 1, 1 << 31, 1 << 32,
    (1 << 47) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**40, 0.0, -1.5, 1e-30, 1e30, 1e308, math.nan, math.inf, None,
    True, False, "", "F32", "U8", "BF16", "F64", "two-bit", "base-3", "int8", "token", "group", "int16", "relu2", "\udc80",
    [], {}, [0], [[]], {"a": 1},
]  # fmt: skip


def seeds() -> list[bytes]:
    """Small whole files of several kinds."""
    found = []
    for family, settings, spec in (
        ("qwen3", {}, {"gain": "scalar"}),
        ("qwen2", {"intermediate_size": 150}, {"activations": "none", "scale": "group-64", "placement": "none"}),
        ("llama", {}, {"cover": "+embeddings", "scale": "row", "placement": "output"}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / native_file.NAME
            model = frozen(family, settings={**SMALL, **settings}, **spec)
            native_file.write(compiler.compile(model, "base-3" if family == "llama" else "two-bit"), path)
            found.append(path.read_bytes())
    return found


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, with the graph inside it as JSON too, and the data."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"]["graph"] = json.loads(header["__metadata__"]["graph"])
    return header, file[8 + length :]


def join(header: dict[str, Any], data: bytes) -> bytes:
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "graph" in metadata:
        header = {**header, "__metadata__": {**metadata, "graph": json.dumps(metadata["graph"])}}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % native_file.ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + data


def damaged_bytes(file: bytes, rng: random.Random) -> bytes:
    data = bytearray(file)
    within = rng.choice([64, 2000, len(data)])
    for _ in range(rng.choice([1, 1, 2, 8, 50])):
        at = rng.randrange(min(within, len(data)) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at : at + rng.randrange(1, 40)] = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * rng.randrange(1, 40)
        elif kind == 3:
            start = rng.randrange(len(data))
            data[at:at] = data[start : start + rng.randrange(200)]
        elif kind == 4:
            del data[at : at + rng.randrange(1, 200)]
        else:
            del data[rng.randrange(len(data)) :]
        if not data:
            break
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def damaged_header(file: bytes, rng: random.Random) -> bytes:
    header, data = split(file)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        spots = list(places(header))
        if not spots:
            break
        if rng.random() < 0.4 and isinstance(header.get("__metadata__"), dict):  # the graph is a small part of it
            spots = list(places(header["__metadata__"])) or spots
        holder, key = rng.choice(spots)
        other_holder, other = rng.choice(spots)
        kind = rng.randrange(7)
        if kind <= 1:
            holder[key] = rng.choice(ODD)
        elif kind == 2 and isinstance(holder[key], int | float) and math.isfinite(holder[key]):
            holder[key] = holder[key] + rng.choice([-64, -1, 1, 2, 4, 64, 128])
        elif kind == 3:
            holder[key] = json.loads(json.dumps(other_holder[other]))
        elif kind == 4:
            holder[key], other_holder[other] = json.loads(json.dumps([other_holder[other], holder[key]]))
        elif kind == 5:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(["x", "head.gain", "layers.1.q.codes", "layers.0.q.bias", "__metadata__"])] = holder[key]
        else:
            holder.append(holder[key])
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + bytes(rng.randrange(1, 300))
    return join(header, data)


def resized(file: bytes, rng: random.Random) -> bytes:
    """A header that agrees with itself and with the file's size, about another model: data is what it needs, at random."""
    header, _ = split(file)
    described = header["__metadata__"]["graph"]
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(["width", "hidden", "heads", "kv_heads", "head_size", "layers", "vocabulary", "group", "head_group"])
        described[key] = max(0, rng.choice([1, 2, 3, 5, 8, 31, 33, 64, 100, 257, described[key] + 1, described[key] * 2]))
    for key, choices in (
        ("layout", ["two-bit", "base-3"]), ("activations", ["token", "group"]), ("gate", ["silu", "relu2"]),
        ("ternary_head", [True, False]), ("ternary_embedding", [True, False]), ("positions", [1, 2, 64, 5000]),
        ("eps", [0, 1e-6, -1.0, 1e20]), ("attention_scale", [0.3, 0, 1e29, -1]), ("rotary_scale", [1, 1e29]),
    ):  # fmt: skip
        if rng.random() < 0.3:
            described[key] = rng.choice(choices)
    described["windows"] = [rng.choice([0, 0, 1, 5, (1 << 31) - 1]) for _ in range(described["layers"])]
    described["rotary"] = [rng.random() < 0.7 for _ in range(described["layers"])]
    try:
        expected = graph.expected_tensors(graph.Header.from_json(described))
    except (ModelError, AssertionError):
        return join(header, b"")
    header, at = {"__metadata__": header["__metadata__"]}, 0
    for name, tensor in sorted(expected.items(), key=lambda item: list(graph.DTYPES).index(item[1].dtype)):
        if tensor.optional and rng.random() < 0.5:
            continue
        shape = rng.choice(tensor.shapes)
        size = graph.DTYPES[tensor.dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": tensor.dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    if at > 1 << 22:
        return join(header, b"")
    return join(header, rng.randbytes(at) if rng.random() < 0.5 else bytes(at))


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [damaged_bytes, damaged_header, damaged_header, resized]


def attempt(path: Path, rng: random.Random) -> bool:
    """Read a file and run it. Returns whether it was refused; anything but a refusal or a run raises, or ends the process."""
    try:
        model = native_file.read(path, rng.choice(["mapped", "copied"]))
        engine = Engine(model, None, [], capacity=9, cache=rng.choice(["bf16", "int8"]), threads=rng.choice([1, 2]))
        logits = engine.logits(torch.zeros(min(5, engine.capacity), dtype=torch.long))
        assert logits.shape[1] == model.header.vocabulary
        ids = [model.header.vocabulary - 1]
        for _ in engine.stream(ids, 3, Sampling(top_k=4), rng.randrange(99)):
            pass
    except ModelError:
        return True
    except Exception as error:
        if type(error).__name__ == "ConfigError" and "there is room for" in str(error):  # one position is no room
            return True
        raise
    return False


def fuzz(seconds: float, seed: int, folder: Path) -> tuple[int, int]:
    """How many files were refused, and how many ran. The one that failed is left in `folder`."""
    whole, refused, ran = seeds(), 0, 0
    path, until, number = folder / native_file.NAME, time.monotonic() + seconds, 0
    while time.monotonic() < until or number < len(whole):
        rng = random.Random(f"{seed} {number}")
        file = whole[number] if number < len(whole) else rng.choice(DAMAGES)(rng.choice(whole), rng)
        number += 1
        path.unlink(missing_ok=True)  # what is mapped keeps its content
        path.write_bytes(file)
        was_refused = attempt(path, rng)
        assert not (number <= len(whole) and was_refused), "a whole file was refused"
        refused, ran = refused + was_refused, ran + (not was_refused)
    path.unlink()
    return refused, ran


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    folder = Path(tempfile.mkdtemp(prefix="trilobit-fuzz-"))
    print(f"seed {seed}; a file that fails is left in {folder}", flush=True)
    try:
        refused, ran = fuzz(seconds, seed, folder)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        raise
    folder.rmdir()
    print(f"{refused + ran} files: {refused} refused, {ran} ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
