"""A model that computes as if its weights, activations and cache were quantised, all in floating point.

    prepare      the protocol's rotations, fused or attached; afterwards the function is the original's
    computing    within it, every decoder linear reads quantised inputs, and attention quantised keys and values

Weights are quantised between the two (rtn.py, gptq.py). Linears that read one tensor (q, k, v) share what they read instead,
so it is computed once. At 16 bits and without rotations nothing is touched, and the logits are the original's bit by bit.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.fourbit.attention import cache_quantizer, changed_attention
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.quarot import head_width
from trilobit.fourbit.rotation import apply_rotations
from trilobit.fourbit.rtn import Grid, Quantizer, round_weight, weight_scales
from trilobit.listener import SILENT, Listener
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
    """A model whose rotations are in place, and the roles of its linears. scales: [O, G] of those whose weights were rounded
    here, by path."""

    model: PreTrainedModel
    roles: Roles
    scales: dict[str, Tensor] = field(default_factory=dict)

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
            if (cache := cache_quantizer(self.model, protocol)) is not None:
                stack.enter_context(changed_attention(self.model, cache))
            for members in groups.values() if protocol.activation_bits < 16 else ():
                hook = _Shared(self._quantizer(members[0][0], protocol), len(members))
                for _, linear in members:
                    stack.callback(linear.register_forward_pre_hook(hook).remove)
            yield self.model

    def _quantizer(self, site: Site, protocol: Protocol) -> Quantizer:
        """Of what the linear at `site` reads."""
        by_head = site.role == "attention-output" and protocol.output_group == "head"
        return Quantizer(
            Grid(protocol.activation_bits, protocol.activation_symmetric),
            protocol.activation_clip,
            head_width(self.model) if by_head else None,
            ("outputs" if by_head else "inputs") in protocol.ranges_with_zero,
        )


def prepare(
    model: PreTrainedModel, protocol: Protocol, windows: Tensor | None = None, progress: Path | None = None,
    listener: Listener = SILENT,
) -> Prepared:  # fmt: skip
    """Apply the protocol's rotations to `model` in place; its function stays, weights and activations are not quantised yet.

    windows: calibration tokens [N, T], for a learned rotation; progress: where it is kept. Raises ModelError for a model
    whose linears have no known roles, and as apply_rotations.
    """
    roles = find_roles(model)
    apply_rotations(model, protocol, windows, progress, listener)
    return Prepared(model, roles)


@torch.no_grad()
def round_weights(prepared: Prepared, protocol: Protocol, listener: Listener = SILENT) -> None:
    """Round the decoder's linears to the nearest, in place."""
    if protocol.weight_bits == 16:
        return
    start, total = time.perf_counter(), len(prepared.roles.sites)
    for done, (site, linear) in enumerate(prepared.linears(), start=1):
        scale, zero = weight_scales(linear.weight, protocol)
        linear.weight.copy_(round_weight(linear.weight, scale, zero, protocol))
        prepared.scales[site.path] = scale
        listener.progress("Rounding linears", done, total, time.perf_counter() - start)
