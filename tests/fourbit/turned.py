"""Queries and keys turned for good: what attention.py does where keys are quantised, without quantising them."""

from torch import Tensor
from transformers import PreTrainedModel

from trilobit.fourbit.hadamard import construction, transform
from trilobit.fourbit.online import OnlineReport, attach_attention
from trilobit.fourbit.quarot import head_width
from trilobit.surgery.roles import decoder_layers


def transform_qk(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return transform(query), transform(key), value


def attach_qk_hadamard(model: PreTrainedModel) -> OnlineReport:
    """Transform queries and keys after RoPE, head by head."""
    width = head_width(model)
    made = construction(width)
    attach_attention(model, transform_qk)
    return OnlineReport("queries and keys, after RoPE", width, tuple(path for path, _ in decoder_layers(model)), made)
