"""What the engine runs, as a file holds it: a header, tensors by name, and which of them a header has, in which shapes.

    Header                    sizes and choices that the tensors do not say
    check(header, found)      names, dtypes and shapes against expected_tensors(header)
    Graph.decoder()           ──▶ what kernels/engine.py runs
    Planned                   a graph whose tensors are made when their turn comes, so that it need not be in memory

infer/compiler.py makes a Graph of a model, infer/native_file.py reads and writes one. docs/formats.md lists the tensors.
Letters: V vocabulary, D width, F hidden width, O rows, K columns, G groups.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from trilobit.errors import ModelError
from trilobit.kernels import native
from trilobit.kernels.engine import PROJECTIONS, Activations, Decoder, Gate, Layer, Projection
from trilobit.kernels.native import Format, PackedMatrix

LEAST_TENSORS = 2 + 2 * len(PROJECTIONS)  # of a layer: norms, and codes and scales of each matrix
DTYPES = {"U8": torch.uint8, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Specs = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype (a key of DTYPES) and shape of tensors, by name."""


@dataclass(frozen=True)
class Header:
    """What the tensors do not say. group: columns of a ternary matrix that share a scale, 0 for none; head_group likewise."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int
    positions: int
    eps: float
    attention_scale: float
    rotary_scale: float
    gate: Gate
    windows: list[int]
    rotary: list[bool]
    layout: Format
    group: int
    activations: Activations
    norm_eps: float
    ternary_head: bool
    head_group: int
    ternary_embedding: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Header":
        """Raises ModelError unless every field is there, of its type and in its range."""
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(cls)}:
            raise ModelError("its header does not list the fields of a native model.")
        for field in fields(cls):
            if not _is_a(value[field.name], field.type):
                raise ModelError(f"its header says {field.name} = {str(value[field.name])[:80]!r}.")
        header = cls(**value)
        sizes = (header.width, header.hidden, header.heads, header.kv_heads, header.head_size, header.layers)
        right = all(0 < size < 1 << 20 for size in sizes)
        right = right and all(0 < size < 1 << 24 for size in (header.vocabulary, header.positions))
        right = right and len(header.windows) == len(header.rotary) == header.layers and min(header.windows) >= 0
        right = right and 0 <= header.group < 1 << 20 and 0 <= header.head_group < 1 << 20 and max(header.windows) < 1 << 31
        if not right or header.layout == "int8" or header.activations == "int16":
            raise ModelError("its header has a size that no model has.")
        return header

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[O, K] of each projection of a layer."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes = {"q": (queries, self.width), "k": (keys, self.width), "v": (keys, self.width), "o": (self.width, queries)}
        return shapes | {"gate": (self.hidden, self.width), "up": (self.hidden, self.width), "down": (self.width, self.hidden)}


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    return value in get_args(kind) if get_args(kind) else isinstance(value, kind)


@dataclass(frozen=True)
class Expected:
    """A tensor's dtype and the shapes it may have."""

    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


def _vector(*lengths: int, optional: bool = False) -> Expected:
    return Expected("F32", tuple((n,) for n in lengths), optional)


def _matrix(name: str, form: Format, rows: int, columns: int, group: int) -> dict[str, Expected]:
    groups = -(-columns // group) if group else 0
    scales = ((groups, rows),) if groups else ((1,), (rows,))
    data = native.packed_bytes(form, rows, columns, group)
    dtype = "F16" if groups and form == "int8" else "F32"
    return {f"{name}.codes": Expected("U8", ((data,),)), f"{name}.scales": Expected(dtype, scales)}


def expected_tensors(h: Header) -> dict[str, Expected]:
    """Every tensor that a model with this header has or may have, by name."""
    found: dict[str, Expected] = {"norm": _vector(h.width), "rope.frequencies": _vector(h.head_size // 2)}
    if h.ternary_embedding:
        found |= _matrix("embedding", h.layout, h.vocabulary, h.width, h.group)
    else:
        found["embedding"] = Expected("BF16", ((h.vocabulary, h.width),))
    if not (h.ternary_head and h.ternary_embedding):  # a tied pair may be stored once
        found |= _head(h)
    else:
        found |= {name: Expected(e.dtype, e.shapes, True) for name, e in _head(h).items()}
    found |= {"head.gain": _vector(h.width, 1, optional=True), "head.bias": _vector(h.vocabulary, optional=True)}
    for layer in range(h.layers):
        at = f"layers.{layer}"
        found |= {f"{at}.attention_norm": _vector(h.width), f"{at}.mlp_norm": _vector(h.width)}
        found |= {f"{at}.{name}": _vector(h.head_size, optional=True) for name in ("q_norm", "k_norm")}
        for name, (rows, columns) in h.matrices().items():
            found |= _matrix(f"{at}.{name}", h.layout, rows, columns, h.group)
            found[f"{at}.{name}.bias"] = _vector(rows, optional=True)
            found[f"{at}.{name}.gain"] = _vector(columns, 1, optional=True)
    return found


def _head(h: Header) -> dict[str, Expected]:
    if h.ternary_head:
        return _matrix("head", h.layout, h.vocabulary, h.width, h.group)
    return _matrix("head", "int8", h.vocabulary, h.width, h.head_group)


def check(header: Header, found: Specs) -> None:
    """Raise ModelError unless names, dtypes and shapes are those of a model with this header."""
    if len(found) < header.layers * LEAST_TENSORS:  # before a million layers are listed
        raise ModelError(f"it holds {len(found)} tensors, too few for {header.layers} layers.")
    try:
        expected = expected_tensors(header)
    except AssertionError as error:  # of the library
        raise ModelError(f"its header has a matrix that no engine has: {error}") from error
    if ("head.codes" in found) != ("head.scales" in found):
        raise ModelError("it holds half of a head.")
    if odd := sorted(found.keys() - expected.keys()):
        raise ModelError(f"it holds a tensor {odd[0][:80]!r} that a native model does not have.")
    for name, tensor in expected.items():
        if name not in found:
            if not tensor.optional:
                raise ModelError(f"it lacks the tensor {name}.")
        elif found[name][0] != tensor.dtype or found[name][1] not in tensor.shapes:
            raise ModelError(
                f"its tensor {name} is {found[name][0]} {list(found[name][1])}, not {tensor.dtype} {tensor.shapes}."
            )


@dataclass(frozen=True)
class Graph:
    """A native model: header and tensors, by the names of expected_tensors."""

    header: Header
    tensors: dict[str, Tensor]

    @property
    def specs(self) -> Specs:
        return specs_of(self.tensors)

    def decoder(self) -> Decoder:
        """The engine's description of it, which shares the tensors."""
        h, t = self.header, self.tensors

        def projection(name: str, form: Format, shape: tuple[int, int], group: int, activations: Activations) -> Projection:
            stored = name if f"{name}.codes" in t else "embedding"  # a tied head
            matrix = PackedMatrix(t[f"{stored}.codes"], *shape, group, form)
            bias, gain = t.get(f"{name}.bias"), t.get(f"{name}.gain")
            return Projection(matrix, t[f"{stored}.scales"], bias, gain, h.norm_eps, activations)

        layers = [
            Layer(
                t[f"layers.{i}.attention_norm"], t[f"layers.{i}.mlp_norm"], t.get(f"layers.{i}.q_norm"),
                t.get(f"layers.{i}.k_norm"),
                {n: projection(f"layers.{i}.{n}", h.layout, s, h.group, h.activations) for n, s in h.matrices().items()},
                h.windows[i], h.rotary[i],
            )
            for i in range(h.layers)
        ]  # fmt: skip
        table = (h.vocabulary, h.width)
        embedding = projection("embedding", h.layout, table, h.group, h.activations) if h.ternary_embedding else t["embedding"]
        if not h.ternary_head:
            head = projection("head", "int8", table, h.head_group, "int16")
        else:
            head = projection("head", h.layout, table, h.group, h.activations)
        return Decoder(
            h.width, h.hidden, h.heads, h.kv_heads, h.head_size, h.vocabulary, h.eps, h.attention_scale, h.rotary_scale,
            t["rope.frequencies"], h.gate, layers, t["norm"], embedding, head,
        )  # fmt: skip


def specs_of(tensors: dict[str, Tensor]) -> Specs:
    """What tensors in memory are."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together. specs: dtype and shape of each, by name."""

    specs: Specs
    make: Callable[[], dict[str, Tensor]]

    def tensors(self) -> dict[str, Tensor]:
        """What `make` gives, on the CPU. It must be what was promised."""
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in self.make().items()}
        assert specs_of(made) == self.specs, (specs_of(made), self.specs)
        return made


@dataclass(frozen=True)
class Planned:
    """A native model before its tensors are made."""

    header: Header
    pieces: list[Piece]

    @property
    def specs(self) -> Specs:
        return {name: spec for piece in self.pieces for name, spec in piece.specs.items()}

    def graph(self) -> Graph:
        """With all its tensors in memory."""
        return Graph(self.header, {name: t for piece in self.pieces for name, t in piece.tensors().items()})
