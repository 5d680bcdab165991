"""Headers of GGUF files: what is wrong is a ModelError at once, whatever the file says."""

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.ggufs import PACKERS, q2_0, write_gguf
from trilobit.errors import ModelError
from trilobit.formats import Q2_0, TQ1_0, TQ2_0, Q2_0Of128
from trilobit.infer.gguf_file import ALIGNMENT, MOST_ITEMS, open_gguf
from trilobit.infer.load import load

SECONDS, MEGABYTES = 4.0, 64
Tensors = list[tuple[str, tuple[int, ...], int, int]]


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def raw(
    tensors: Tensors, data: int, keys: list[bytes] | None = None, version: int = 3, counts: tuple[int, int] | None = None,
    alignment: int = ALIGNMENT,
) -> bytes:  # fmt: skip
    """A file by hand: tensors as name, dimensions (fastest first), type, offset; `data` zeros after the header."""
    keys = keys or []
    said = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *said) + b"".join(keys)
    for name, dimensions, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return head + b"\0" * (-len(head) % alignment) + b"\0" * data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ONE: Tensors = [("a", (8, 2), 0, 0)]
TWO: Tensors = [("a", (8, 2), 0, 0), ("b", (8,), 0, 64)]
HUGE = 1 << 62
HOSTILE: list[tuple[bytes, str]] = [
    (b"", "goes on past the end"),
    (b"GGUF", "goes on past the end"),
    (b"GGML" + raw(ONE, 64)[4:], "does not begin with GGUF"),
    (raw(ONE, 64, version=1), "version 1"),
    (raw(ONE, 64, version=3 << 24), "big-endian"),
    (raw(ONE, 64, counts=(HUGE, 0)), f"{HUGE} tensors"),
    (raw(ONE, 64, counts=(1, HUGE)), f"{HUGE} keys"),
    (raw(ONE, 64, counts=(30_000, 0)), "past the end|its tensor|it has a name"),
    (raw(ONE, 64, [struct.pack("<Q", HUGE)]), f"a text of {HUGE} bytes"),
    (raw(ONE, 64, [struct.pack("<Q", 900)]), "past the end|it has a name"),
    (raw(ONE, 64, [text("")]), "it has a name ''"),
    (raw(ONE, 64, [text("a\nb")]), "it has a name"),
    (raw(ONE, 64, [key("k", 8, struct.pack("<Q", 1 << 23))]), "past the end"),
    (raw(ONE, 64, [key("k", 13, b"")]), "a value of type 13"),
    (raw(ONE, 64, [key("k", 4, b"1234"), key("k", 4, b"1234")]), "the key 'k' twice"),
    (raw(ONE, 64, [key("k", 9, struct.pack("<IQ", 0, HUGE))]), f"a list of {HUGE} items"),
    (raw(ONE, 64, [key("k", 9, struct.pack("<IQ", 12, MOST_ITEMS))]), "past the end"),
    (raw(ONE, 64, [key("k", 9, struct.pack("<IQ", 8, MOST_ITEMS))]), "past the end|a text of"),
    (raw(ONE, 64, [key("k", 9, struct.pack("<IQ", 9, 4))]), "a list of type 9"),
    (raw([("a", (), 0, 0)], 64), "0 dimensions"),
    (raw([("a", (1,) * 5, 0, 0)], 64), "5 dimensions"),
    (raw([("a", (0, 2), 0, 0)], 64), r"the shape \[2, 0\]"),
    (raw([("a", ((1 << 64) - 8, 2), 0, 0)], 64), "the shape"),  # −8
    (raw([("a", (1 << 32, 1 << 32), 0, 0)], 64), "the shape"),  # 2⁶⁴ is 0 in 64 bits
    (raw([("a", (1 << 20, 1 << 20), 0, 0)], 64), "is at 0, where the one before it ends at 0 and the file at 64"),
    (raw([("a", (8, 2), 99, 0)], 64), "has type 99, which is not read"),
    (raw([("a", (8, 2), 36, 0)], 64), "I2_S, bitnet.cpp's.*HF checkpoint"),
    (raw([("a", (100, 2), 35, 0)], 64), "no whole blocks of 256"),
    (raw([("a", (256,), 35, 0)], 66), "has type 35"),
    (raw(TWO, 95), "and the file at 95"),
    (raw(TWO, 1000), "something that no tensor is"),
    (raw([TWO[0], ("b", (8,), 0, 32)], 96), "'b' of 32 bytes is at 32, where the one before it ends at 64"),  # overlap
    (raw([TWO[0], ("b", (8,), 0, 96)], 128), "'b' of 32 bytes is at 96"),  # hole
    (raw([TWO[0], ("b", (8,), 0, 68)], 128), "'b' of 32 bytes is at 68"),  # not aligned
    (raw([TWO[0], ("b", (8,), 0, HUGE)], 128), f"at {HUGE}"),
    (raw([TWO[0], ("a", (8,), 0, 64)], 96), "the tensor 'a' twice"),
    *[
        (raw(ONE, 64, [key("general.alignment", 4, struct.pack("<I", n))]), f"alignment is {n}, which is no power of two")
        for n in (0, 24, 1 << 20)
    ],
    (raw(ONE, 64, [key("general.alignment", 8, text("32"))]), "alignment is 32"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "says"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_headers_are_refused_at_once(tmp_path: Path, content: bytes, says: str) -> None:
    """Truncated, giant or negative sizes, overlaps, holes, wrong alignment: refused in bounded time and memory, in one line."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(ModelError, match=says) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < SECONDS
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        load(path)


def test_whole_files_open(tmp_path: Path) -> None:
    """What the hostile ones were made from; an alignment of another size; a last tensor without padding."""
    path = tmp_path / "model.gguf"
    path.write_bytes(raw(TWO, 96, [key("k", 4, b"\1\0\0\0"), key("l", 9, struct.pack("<IQ2H", 2, 2, 3, 4))]))
    file = open_gguf(path)
    assert file.metadata == {"k": 1, "l": [3, 4]}
    assert {name: place.shape for name, place in file.tensors.items()} == {"a": (2, 8), "b": (8,)}
    path.write_bytes(
        raw([("a", (3,), 0, 0), ("b", (3,), 0, 64)], 76, [key("general.alignment", 4, b"\x40\0\0\0")], alignment=64)
    )
    assert open_gguf(path).tensors["b"].size == 12


def test_the_layout_of_type_42_is_told_by_its_size(tmp_path: Path) -> None:
    """Blocks of 64 and of 128 columns have one number: those that fill the file are meant; where both do, it is refused."""
    path, size = tmp_path / "model.gguf", {64: 18, 128: 34}
    for group, layout in ((64, Q2_0), (128, Q2_0Of128)):
        for rows in (64, 300):
            first = rows * 256 // group * size[group]
            second = first + -first % ALIGNMENT
            tensors: Tensors = [("a", (256, rows), 42, 0), ("b", (4,), 0, second), ("c", (256, rows), 42, second + 32)]
            path.write_bytes(raw(tensors, second + 32 + first))
            assert {p.ternary for p in open_gguf(path).tensors.values()} == {layout, None}
    path.write_bytes(raw([("a", (128, 1), 42, 0), ("b", (4,), 0, 64)], 80))  # 36 and 34 bytes: 64 with padding
    with pytest.raises(ModelError, match="too small to tell whether a block"):
        open_gguf(path)


@pytest.mark.parametrize(("kind", "layout"), [("tq1_0", TQ1_0), ("tq2_0", TQ2_0), ("q2_0", Q2_0), ("q2_0-128", Q2_0Of128)])
def test_codes_and_scales_are_read_as_others_write_them(tmp_path: Path, kind: str, layout: Any) -> None:
    """The gguf package's codecs, and Q2_0 by its definition: codes and fp16 scales; negative scales turn the codes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (96, 512), generator=generator).float()
    codes[:, :: layout.BLOCK] = 1  # every block has its scale
    scales = (torch.rand(96, 512 // layout.BLOCK, generator=generator) + 0.1).half().float()
    weight = codes * scales.repeat_interleave(layout.BLOCK, 1)
    data = PACKERS[kind][1](weight.numpy())
    path = tmp_path / "model.gguf"
    path.write_bytes(raw([("a", (512, 96), layout.TYPE, 0)], 0) + data.tobytes())
    read = open_gguf(path).ternary("a")
    assert torch.equal(read[0], codes.to(torch.int8))
    assert torch.equal(read[1], scales)
    assert torch.equal(open_gguf(path).dense("a"), weight)
    at = 0 if "q2" in kind[:2] else layout.SIZE - 2
    blocks = data.reshape(-1, layout.SIZE).copy()
    blocks[:, at + 1] |= 0x80
    path.write_bytes(raw([("a", (512, 96), layout.TYPE, 0)], 0) + blocks.tobytes())
    assert torch.equal(open_gguf(path).dense("a"), -weight)
    blocks[3, at : at + 2] = 0xFF
    path.write_bytes(raw([("a", (512, 96), layout.TYPE, 0)], 0) + blocks.tobytes())
    with pytest.raises(ModelError, match="not finite"):
        open_gguf(path).ternary("a")


def test_a_fourth_level_is_not_ternary(tmp_path: Path) -> None:
    """Q2_0 has a symbol for +2."""
    data = q2_0(torch.ones(64, 64).numpy(), 64)
    data[5, 9] = 0xFF
    path = tmp_path / "model.gguf"
    path.write_bytes(raw([("a", (64, 64), 42, 0)], 0) + data.tobytes())
    with pytest.raises(ModelError, match="a fourth level"):
        open_gguf(path).ternary("a")


def _flip(data: bytearray, chosen: random.Random) -> None:
    data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)


def _number(data: bytearray, chosen: random.Random) -> None:
    at = chosen.randrange(max(1, len(data) - 8))
    data[at : at + 8] = struct.pack("<Q", chosen.choice([0, 1, 7, 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1]))


def _cut(data: bytearray, chosen: random.Random) -> None:
    del data[chosen.randrange(9, max(10, len(data))) :]


def _double(data: bytearray, chosen: random.Random) -> None:
    at = chosen.randrange(len(data))
    data[at:at] = data[at : at + chosen.randrange(1, 64)]


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [_flip, _flip, _number, _number, _cut, _double]


def damaged(whole: bytes, header: int, chosen: random.Random) -> bytes:
    """One to three damages, mostly in the first `header` bytes, half of them in front of the tokens."""
    tokens = whole.index(b"tokenizer.ggml.tokens")
    data = bytearray(whole[: chosen.choices([tokens, header, len(whole)], [4, 5, 1])[0]])
    rest = whole[len(data) :]
    for _ in range(chosen.randrange(1, 4)):
        chosen.choice(DAMAGES)(data, chosen)
    return bytes(data) + rest


def test_damaged_files_are_models_or_refused(tmp_path: Path) -> None:
    """A file with random damage, mostly in its header, loads, or a ModelError says why not; each within seconds. (More of
    them: fuzz_gguf_file.py.)"""
    small = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1
    }  # fmt: skip
    whole = write_gguf(tmp_path / "whole.gguf", "llama", "q2_0", **small).path.read_bytes()
    header = len(whole) - sum(p.size for p in open_gguf(tmp_path / "whole.gguf").tensors.values())
    path, chosen, loads = tmp_path / "model.gguf", random.Random(0), 0
    for _ in range(400):
        path.write_bytes(damaged(whole, header, chosen))
        started, said = time.perf_counter(), ""
        try:
            load(path)
            loads += 1
        except ModelError as error:
            said = str(error)
        assert "\n" not in said, said
        assert time.perf_counter() - started < SECONDS
    assert 0 < loads < 200
