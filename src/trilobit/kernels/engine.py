"""The native engine (native/engine.h) through ctypes: a decoder's tensors in, logits out.

    Decoder     a graph of pointers into torch tensors, checked by the library
    Session     its cache of keys and values: run(ids, slots, positions) → logits
    sample      a token from logits

Letters: T tokens of a call, V vocabulary. native/engine.h says what is computed.
"""

import ctypes
import threading
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trilobit.errors import ModelError
from trilobit.kernels import native
from trilobit.kernels.native import PackedMatrix

Activations = Literal["token", "group", "int16"]
ACTIVATIONS: dict[str, int] = {"token": 0, "group": 1, "int16": 2}
Gate = Literal["silu", "relu2"]
GATES: dict[str, int] = {"silu": 0, "relu2": 1}
Cache = Literal["bf16", "int8"]
CACHES: dict[str, int] = {"bf16": 0, "int8": 1}
NO_MEMORY = -5


@dataclass(frozen=True)
class Projection:
    """y = W · Q(norm(x)) + b. scales: fp32, one, [O], or with groups [G, O], those of a head also fp16; bias: [O] or None;
    gain: of an RMSNorm in front, [K] or [1], or None."""

    matrix: PackedMatrix
    scales: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None
    eps: float = 0.0
    activations: Activations = "token"


@dataclass(frozen=True)
class Layer:
    """A decoder layer. Norms: fp32 [D], q_norm and k_norm [E] or None; window: latest positions seen, 0 for all."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    projections: dict[str, Projection]  # q k v o gate up down
    window: int
    rotary: bool


@dataclass(frozen=True)
class Decoder:
    """A whole model. embedding: [V, D] bf16, or a matrix whose rows are the embeddings."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    eps: float
    attention_scale: float
    rotary_scale: float
    frequencies: Tensor  # [E/2] fp32, radians a position
    gate: Gate
    layers: list[Layer]
    final_norm: Tensor
    embedding: Tensor | Projection
    head: Projection


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class _Projection(Structure):
    _fields_ = [
        ("matrix", native._Matrix), ("scales", c_void_p), ("scale_count", c_int64), ("bias", c_void_p), ("gain", c_void_p),
        ("gain_count", c_int64), ("eps", c_float), ("activations", c_int32), ("half_scales", c_int32),
    ]  # fmt: skip


class _Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _Projection) for name in PROJECTIONS),
        ("window", c_int64), ("rotary", c_int32),
    ]  # fmt: skip


class _Graph(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("width", "hidden", "heads", "kv_heads", "head_size", "layers", "vocabulary")),
        ("eps", c_float), ("attention_scale", c_float), ("rotary_scale", c_float), ("frequencies", c_void_p), ("gate", c_int32),
        ("layer", POINTER(_Layer)), ("final_norm", c_void_p), ("embedding", c_void_p), ("embedding_matrix", _Projection),
        ("head", _Projection),
    ]  # fmt: skip


class _Sampling(Structure):
    _fields_ = [
        ("temperature", c_float), ("top_k", c_int64), ("top_p", c_float), ("min_p", c_float), ("repetition_penalty", c_float)
    ]  # fmt: skip


def _pointer(tensor: Tensor | None, count: int | None = None, dtype: torch.dtype = torch.float32) -> int | None:
    """The data pointer of a contiguous tensor, checked. The library is told no lengths beyond those it can derive."""
    if tensor is None:
        return None
    assert tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu", (tensor.dtype, tensor.device)
    assert count is None or tensor.numel() == count, (tensor.numel(), count)
    return tensor.data_ptr()


def _projection(p: Projection) -> _Projection:
    m = p.matrix
    expected = native.packed_bytes(m.format, m.rows, m.columns, m.group)
    matrix = native._Matrix(_pointer(m.data, expected, torch.uint8), m.rows, m.columns, m.group, native.FORMATS[m.format])
    gains = 0 if p.gain is None else p.gain.numel()
    half = p.scales.dtype == torch.float16
    return _Projection(
        matrix, _pointer(p.scales, None, torch.float16 if half else torch.float32), p.scales.numel(), _pointer(p.bias, m.rows),
        _pointer(p.gain), gains, p.eps, ACTIVATIONS[p.activations], half,
    )  # fmt: skip


def _graph(d: Decoder) -> _Graph:
    layers = (_Layer * len(d.layers))()
    for to, layer in zip(layers, d.layers, strict=True):
        to.attention_norm, to.mlp_norm = _pointer(layer.attention_norm, d.width), _pointer(layer.mlp_norm, d.width)
        to.q_norm, to.k_norm = _pointer(layer.q_norm, d.head_size), _pointer(layer.k_norm, d.head_size)
        for name in PROJECTIONS:
            setattr(to, name, _projection(layer.projections[name]))
        to.window, to.rotary = layer.window, layer.rotary
    dense = isinstance(d.embedding, Tensor)
    return _Graph(
        d.width, d.hidden, d.heads, d.kv_heads, d.head_size, len(d.layers), d.vocabulary, d.eps, d.attention_scale,
        d.rotary_scale, _pointer(d.frequencies, d.head_size // 2), GATES[d.gate], layers, _pointer(d.final_norm, d.width),
        _pointer(d.embedding, d.vocabulary * d.width, torch.bfloat16) if dense else None,  # pyright: ignore[reportArgumentType]
        _Projection() if dense else _projection(d.embedding), _projection(d.head),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


class Session:
    """A decoder with a cache for `slots` sequences of up to `capacity` positions, run up to `most_tokens` tokens a call.

    Raises ModelError where there is no memory. Calls from several threads wait for each other; a call computes on several.
    """

    def __init__(
        self, decoder: Decoder, *, slots: int = 1, capacity: int = 2048, cache: Cache = "bf16", most_tokens: int = 512,
        threads: int | None = None, instructions: str | None = None,
    ):  # fmt: skip
        self._library, self._lock = native._loaded(), threading.Lock()
        self._decoder = decoder  # owns what the graph points to
        self._graph = _graph(decoder)
        self.vocabulary, self.slots, self.capacity, self.most_tokens = decoder.vocabulary, slots, capacity, most_tokens
        self.threads, self._set = native._threads(threads), native._number(instructions)
        status = c_int32(0)
        self._session: int | None = self._library.functions["session_new"](
            byref(self._graph), slots, capacity, CACHES[cache], most_tokens, byref(status)
        )
        if self._session is None:
            if status.value == NO_MEMORY:
                raise ModelError(
                    f"there is no memory for keys and values of {slots} × {capacity} tokens: take fewer, or an int8 cache."
                )
            raise ModelError("the engine cannot hold this model: the sizes of its parts do not fit together.")

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            if self._session is not None:
                self._library.functions["session_free"](self._session)
                self._session = None

    def __del__(self) -> None:
        if getattr(self, "_session", None) is not None:
            self.close()

    @property
    def bytes(self) -> int:
        """Of cache and working memory."""
        assert self._session is not None, "the session is closed"
        return self._library.functions["session_bytes"](self._session)

    def run(
        self, ids: Tensor, slots: Tensor, positions: Tensor, rows: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Run T ≤ most_tokens tokens and return logits [rows, V] fp32 of those in `rows` (default: the last).

        All int32 [T]. A token sees the positions of its slot up to its own. `out`: where the logits go.
        """
        tokens = ids.numel()
        rows = torch.tensor([tokens - 1], dtype=torch.int32) if rows is None else rows
        out = torch.empty(rows.numel(), self.vocabulary) if out is None else out
        with self._lock:
            assert self._session is not None, "the session is closed"
            self._library.call(
                "forward", self._session, tokens, _pointer(ids, tokens, torch.int32), _pointer(slots, tokens, torch.int32),
                _pointer(positions, tokens, torch.int32), rows.numel(), _pointer(rows, None, torch.int32),
                _pointer(out, rows.numel() * self.vocabulary), self._set, self.threads,
            )  # fmt: skip
        return out


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; the defaults take the model's own distribution at temperature 1.

    In this order: repetition_penalty (positive logits of earlier tokens divided by it, negative ones multiplied),
    temperature (0: the likeliest), top_k (0: all), top_p, min_p (relative to the likeliest). Arithmetic of transformers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Sampler:
    """A stream of random choices from a seed."""

    def __init__(self, sampling: Sampling, seed: int = 0):
        s = sampling
        self._sampling = _Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty)
        self._penalty = s.repetition_penalty != 1
        self._state = ctypes.c_uint64(seed)
        self._sample = native._loaded().functions["sample"]

    def __call__(self, logits: Tensor, history: Sequence[int] = ()) -> int:
        """A token from logits [V] fp32. Raises ModelError where they are not finite."""
        past = (c_int32 * len(history))(*history) if self._penalty else None
        count = len(history) if self._penalty else 0
        arguments: tuple[Any, ...] = (byref(self._sampling), past, count, byref(self._state))
        token = self._sample(_pointer(logits), logits.numel(), *arguments)
        if token == -4:
            raise ModelError("the model gives logits that are not finite: its weights are damaged, or overflow.")
        assert token >= 0, f"trilobit_sample: {native._STATUS.get(token, token)}"
        return token
