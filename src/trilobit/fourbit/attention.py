"""What goes into attention: watched, or changed, between RoPE and the scores.

transformers hands queries, keys and values (normalised, rotated by position, from the cache if there is one) to an attention
function that a name chooses. Ours passes them through a function of the caller's, then to transformers' own `sdpa`. So keys
and values are fake-quantised where a cache would hold them, in every family that uses this interface; a model that does not
is refused, because its cache would silently stay at 16 bits.

Letters: B sequences, H heads, T positions, d a head's width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trilobit.errors import ModelError
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.rtn import Grid, Quantizer
from trilobit.surgery.roles import PROBE_TOKENS, decoder_layers, evaluating

NAME = "trilobit_attention"
ATTRIBUTE = "_trilobit_attention"
Change = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Heads:
    """Of one layer's attention: query heads, key heads, and the widths of a key and of a value."""

    queries: int
    keys: int
    key_width: int
    value_width: int


@contextmanager
def changed_attention(model: PreTrainedModel, change: Change) -> Iterator[None]:
    """Within, every attention of `model` works on what `change(module, q, k, v)` returns. q: [B, H, T, d]; k, v: with
    the key heads. Afterwards the model has its own attention back. One change at a time."""
    before = model.config._attn_implementation
    modules = [module for _, layer in decoder_layers(model) for module in layer.modules()]
    assert not any(hasattr(module, ATTRIBUTE) for module in modules), "attention is changed already"
    model.set_attn_implementation(NAME)
    for module in modules:
        object.__setattr__(module, ATTRIBUTE, change)
    try:
        yield
    finally:
        for module in modules:
            object.__delattr__(module, ATTRIBUTE)
        model.set_attn_implementation(before)


def find_heads(model: PreTrainedModel) -> list[Heads]:
    """The heads of each decoder layer, in order, seen in a forward over a few tokens. Raises ModelError for a model whose
    attention does not go through transformers' interface, once a layer."""
    found: list[Heads] = []

    def see(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found.append(Heads(query.shape[1], key.shape[1], key.shape[-1], value.shape[-1]))
        return query, key, value

    ids = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
    with evaluating(model), changed_attention(model, see):
        model.base_model(input_ids=ids, use_cache=False)
    layers = len(decoder_layers(model))
    if len(found) != layers:
        raise ModelError(
            f"{type(model).__name__}: {len(found)} of its {layers} layers hand keys and values to transformers' attention "
            "interface, so they cannot be quantised. Use a family that does (Llama, Mistral, Qwen, Gemma, OLMo, Phi, …)."
        )
    return found


@dataclass(frozen=True)
class CacheQuantizer:
    """Fake quantisation of keys and values; None: 16 bits. turn: rotates the last dimension of queries and keys first."""

    keys: Quantizer | None
    values: Quantizer | None
    turn: Callable[[Tensor], Tensor] | None

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.turn is not None:
            query, key = self.turn(query), self.turn(key)
        return query, key if self.keys is None else self.keys(key), value if self.values is None else self.values(value)


def cache_quantizer(protocol: Protocol, turn: Callable[[Tensor], Tensor]) -> CacheQuantizer | None:
    """What `protocol` does to keys and values, `turn` being its Hadamard; None for nothing at all."""
    if protocol.key_bits == 16 and protocol.value_bits == 16:
        return None

    def of(bits: int, zero_inside: bool) -> Quantizer | None:
        grid = Grid(bits, protocol.cache_symmetric)
        return None if bits == 16 else Quantizer(grid, protocol.cache_clip, None, zero_inside)

    return CacheQuantizer(
        of(protocol.key_bits, "keys" in protocol.ranges_with_zero),
        of(protocol.value_bits, "values" in protocol.ranges_with_zero),
        turn if protocol.query_key_hadamard == "quantized" and protocol.key_bits < 16 else None,
    )


def _forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
    if options.get("softcap") is not None:
        raise ModelError(f"{type(module).__name__} caps its scores (softcap), which this attention does not do.")
    change: Change = getattr(module, ATTRIBUTE)
    return sdpa_attention_forward(module, *change(module, query, key, value), *arguments, **options)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
