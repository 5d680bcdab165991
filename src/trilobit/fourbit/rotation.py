"""The seam to rotations: which a protocol asks for, where they go, and what a model has no room for.

    y = W x = (W M)(Mᵀ x)      M orthogonal: weights are turned once, in float64; inputs on the fly

Fused ones (the residual stream, values within a head) leave no trace in the forward; online ones (the MLP's last linear,
across heads, queries and keys) are transforms of the last dimension that run before quantisation.

Letters: H heads, d a head's width, K inputs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.fourbit.attention import Heads
from trilobit.fourbit.protocol import Protocol
from trilobit.surgery.roles import Roles

Transform = Callable[[Tensor], Tensor]


def hadamard(x: Tensor) -> Tensor:
    """[..., K] times the orthonormal Hadamard matrix of order K."""
    block = x.shape[-1] & -x.shape[-1]
    y = x.reshape(*x.shape[:-1], -1, block)
    span = 1
    while span < block:
        pairs = y.unflatten(-1, (-1, 2, span))
        first, second = pairs.unbind(-2)
        y = torch.stack([first + second, first - second], -2).flatten(-3)
        span *= 2
    return (y / block**0.5).reshape(x.shape)


def across_heads(x: Tensor, heads: int) -> Tensor:
    """[..., H · d]: each channel of a head mixed with the same channel of the others."""
    parts = x.unflatten(-1, (heads, -1)).transpose(-1, -2)
    return hadamard(parts).transpose(-1, -2).flatten(-2)


@torch.no_grad()
def fuse_online(
    model: PreTrainedModel, roles: Roles, heads: Sequence[Heads], protocol: Protocol
) -> tuple[dict[str, Transform], list[str]]:
    """Counter-rotate the weights of linears whose inputs are to be rotated online. Returns the transform of each such linear
    by path, and notes of what could not be had."""
    transforms: dict[str, Transform] = {}
    notes: list[str] = []
    for site in roles.sites:
        if site.role == "mlp-output" and protocol.ffn_hadamard:
            transforms[site.path] = hadamard
        elif site.role == "attention-output" and protocol.head_hadamard:
            transforms[site.path] = partial(across_heads, heads=heads[site.layer].queries)
    for path, transform in transforms.items():
        weight = model.get_submodule(path).weight
        weight.copy_(transform(weight.double()))
    return transforms, notes
