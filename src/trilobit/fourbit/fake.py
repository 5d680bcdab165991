"""A model that computes as if its weights, activations and cache were quantised, all in floating point.

    prepare      rotations that are fused, transforms that stay online; afterwards the function is the original's
    computing    within it, every decoder linear reads transformed and quantised inputs, attention quantised keys and values

Weights are quantised between the two (rtn.py, gptq.py). Linears that read one tensor (q, k, v) share what they read instead,
so it is computed once. At 16 bits and without rotations nothing is touched, and the logits are the original's bit by bit.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.fourbit.attention import Heads, cache_quantizer, changed_attention, find_heads
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.rotation import Transform, fuse_online, hadamard
from trilobit.fourbit.rtn import Grid, Quantizer, round_to_nearest
from trilobit.surgery.roles import Roles, Site, find_roles


class _Shared:
    """A forward pre-hook of linears that read one tensor: each gets `change` of it, computed for the first of them."""

    def __init__(self, change: Callable[[Tensor], Tensor], readers: int):
        self.change, self.readers = change, readers
        self.left, self.source, self.result = 0, None, None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.left == 0 or self.source is not inputs[0]:
            self.source, self.result, self.left = inputs[0], self.change(inputs[0]), self.readers
        result = self.result
        self.left -= 1
        if self.left == 0:
            self.source = self.result = None  # activations are not kept beyond their use
        return (result, *inputs[1:])


@dataclass
class Prepared:
    """A model whose rotations are fused. transforms: what linears (by path) read is turned by. notes: for the user."""

    model: PreTrainedModel
    roles: Roles
    heads: list[Heads]
    transforms: dict[str, Transform]
    notes: list[str] = field(default_factory=list)

    def linears(self) -> Iterator[tuple[Site, nn.Linear]]:
        """Every decoder linear with its site, in running order."""
        for site in self.roles.sites:
            linear = self.model.get_submodule(site.path)
            assert isinstance(linear, nn.Linear), type(linear)
            yield site, linear

    @contextmanager
    def computing(self, protocol: Protocol) -> Iterator[PreTrainedModel]:
        """Within, the model computes with the protocol's activations and cache (its weights are what they are)."""
        groups: dict[int, list[tuple[Site, nn.Linear]]] = defaultdict(list)
        for site, linear in self.linears():
            groups[site.group].append((site, linear))
        with ExitStack() as stack:
            for members in groups.values():
                change = self._change(members[0][0], protocol)
                if change is not None:
                    hook = _Shared(change, len(members))
                    for _, linear in members:
                        stack.callback(linear.register_forward_pre_hook(hook).remove)
            if (cache := cache_quantizer(protocol, hadamard)) is not None:
                stack.enter_context(changed_attention(self.model, cache))
            yield self.model

    def _change(self, site: Site, protocol: Protocol) -> Callable[[Tensor], Tensor] | None:
        """Of the input of a site: transform, then quantisation; None for neither."""
        transform, quantizer = self.transforms.get(site.path), None
        if protocol.activation_bits < 16:
            by_head = site.role == "attention-output" and protocol.output_group == "head"
            quantizer = Quantizer(
                Grid(protocol.activation_bits, protocol.activation_symmetric),
                protocol.activation_clip,
                self.heads[site.layer].value_width if by_head else None,
                ("outputs" if by_head else "inputs") in protocol.ranges_with_zero,
            )
        if transform is None or quantizer is None:
            return transform or quantizer
        return lambda x: quantizer(transform(x))


def prepare(model: PreTrainedModel, protocol: Protocol) -> Prepared:
    """Apply the protocol's rotations to `model` in place; its function stays, weights and activations are not quantised yet.

    Raises ModelError for a model whose linears have no known roles, or whose attention cannot be reached.
    """
    roles = find_roles(model)
    heads = find_heads(model)
    transforms, notes = fuse_online(model, roles, heads, protocol)
    return Prepared(model, roles, heads, transforms, notes)


@torch.no_grad()
def round_weights(prepared: Prepared, protocol: Protocol) -> None:
    """Round the decoder's linears to the nearest, in place."""
    if protocol.weight_bits < 16:
        for _, linear in prepared.linears():
            linear.weight.copy_(round_to_nearest(linear.weight, protocol))
