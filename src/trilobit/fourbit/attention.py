"""Fake-quantised keys and values: where a cache would hold them, after RoPE and normalisation (online.py reaches them).

Queries and keys are turned by a Hadamard matrix of the head's width first, which leaves every score as it is and spreads the
outliers of a key over its channels. Each token and head has a scale of its own.

Letters: B sequences, H heads, T positions, d a head's width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.fourbit.hadamard import construction, transform
from trilobit.fourbit.online import Change, attach_attention, probe
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.quarot import head_width
from trilobit.fourbit.rtn import Grid, Quantizer

NO_TURN = (
    "Queries and keys cannot be turned: leave keys at 16 bits (--bits 4-4-16-4), or give --protocol a file that has "
    "query_key_hadamard none."
)


@dataclass(frozen=True)
class CacheQuantizer:
    """Of keys and values; None: 16 bits. turn: queries and keys are transformed first."""

    keys: Callable[[Tensor], Tensor] | None
    values: Callable[[Tensor], Tensor] | None
    turn: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, H, T, d], keys and values with heads of their own."""
        if self.turn:
            query, key = transform(query), transform(key)
        return query, key if self.keys is None else self.keys(key), value if self.values is None else self.values(value)


def cache_quantizer(model: PreTrainedModel, protocol: Protocol) -> CacheQuantizer | None:
    """What `protocol` does to keys and values of `model`; None for nothing. Raises UnsupportedError for a head width that
    has no Hadamard matrix, if one is asked for."""
    if protocol.key_bits == 16 and protocol.value_bits == 16:
        return None

    def of(bits: int, zero_inside: bool) -> Quantizer | None:
        grid = Grid(bits, protocol.cache_symmetric)
        return None if bits == 16 else Quantizer(grid, protocol.cache_clip, None, zero_inside)

    turn = protocol.query_key_hadamard == "quantized" and protocol.key_bits < 16
    if turn:
        construction(head_width(model), NO_TURN)
    keys = of(protocol.key_bits, "keys" in protocol.ranges_with_zero)
    return CacheQuantizer(keys, of(protocol.value_bits, "values" in protocol.ranges_with_zero), turn)


@contextmanager
def changed_attention(model: PreTrainedModel, change: Change) -> Iterator[None]:
    """Within, every attention of `model` works on what `change(q, k, v)` returns; afterwards it is as it was.

    Raises ModelError for a model whose attention is not reached: its cache would silently stay at 16 bits.
    """
    detach = attach_attention(model, change)
    try:
        yield
    finally:
        detach()


def value_width(model: PreTrainedModel) -> int:
    """Channels of one head of values as attention gets them; where it cannot be reached, from the model's config.

    Raises ModelError where keys and values, or layers, have heads of different widths.
    """
    seen: set[tuple[int, int]] = set()

    def look(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.add((key.shape[-1], value.shape[-1]))
        return query, key, value

    try:
        with changed_attention(model, look):
            probe(model)
    except ModelError:
        return head_width(model)
    widths = {width for pair in seen for width in pair}
    if len(widths) > 1:
        raise ModelError(
            f"{type(model).__name__} has heads of different widths ({', '.join(map(str, sorted(widths)))}: keys and values of "
            "latent attention, or layers that differ), of which no protocol here says how they are quantised."
        )
    return widths.pop()
