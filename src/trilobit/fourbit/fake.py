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

from trilobit.errors import ConfigError, ModelError
from trilobit.fourbit.attention import cache_quantizer, changed_attention, value_width
from trilobit.fourbit.hadamard import construction
from trilobit.fourbit.online import NO_FFN, has_online_transform
from trilobit.fourbit.protocol import ROTATIONS, Protocol
from trilobit.fourbit.quarot import head_width
from trilobit.fourbit.rotation import apply_rotations, learning_cache
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
    """A model whose rotations are in place, and the roles of its linears.

    protocol: its rotations, and once weights are quantised theirs. values: channels of one head of them. applied: what was
    done, and what the model had no room for. scales: [O, G] of those whose weights were rounded here, by path. progress:
    where GPTQ kept its layers. earlier: seconds that earlier processes spent on what was read back.
    """

    model: PreTrainedModel
    roles: Roles
    protocol: Protocol
    values: int
    applied: list[str] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)
    progress: Path | None = None
    earlier: float = 0.0

    def require(self, protocol: Protocol) -> None:
        """Raise ConfigError unless `protocol` has the rotations, and the weights once there are some, of this model."""
        same = self.protocol.weights_alone if self.scales else self.protocol
        if changed := same.changed(protocol.weights_alone if self.scales else protocol, None if self.scales else ROTATIONS):
            raise ConfigError(f"the model was prepared by another protocol: {', '.join(changed)}. Prepare it by this one.")

    def applied_by(self, protocol: Protocol) -> list[str]:
        """What was done to the model, and what is done at the bits of `protocol` as it runs."""
        cache = cache_quantizer(self.model, protocol)
        turned = [f"queries and keys, after RoPE: {construction(head_width(self.model))}"] if cache and cache.turn else []
        return [*self.applied, *turned]

    def linears(self) -> Iterator[tuple[Site, nn.Linear]]:
        """Every decoder linear with its site, in running order."""
        for site in self.roles.sites:
            linear = self.model.get_submodule(site.path)
            assert isinstance(linear, nn.Linear), type(linear)
            yield site, linear

    @contextmanager
    def computing(self, protocol: Protocol) -> Iterator[PreTrainedModel]:
        """Within, the model computes with the protocol's activations and cache (its weights are what they are).

        Raises ConfigError for a protocol that the model was not prepared by, ModelError and UnsupportedError where its cache
        cannot be quantised.
        """
        self.require(protocol)
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
            self.values if by_head else None,
            ("outputs" if by_head else "inputs") in protocol.ranges_with_zero,
        )


def prepare(
    model: PreTrainedModel, protocol: Protocol, windows: Tensor | None = None, progress: Path | None = None,
    listener: Listener = SILENT,
) -> Prepared:  # fmt: skip
    """Apply the protocol's rotations to `model` in place; its function stays, weights and activations are not quantised yet.

    windows: calibration tokens [N, T], for a learned rotation; progress: where it is kept. Raises ModelError and
    UnsupportedError as require_capability and, for a residual stream that cannot be turned, as apply_rotations: the model is
    then as it was. Raises ConfigError for a model that has online transforms already.
    """
    prepared = require_capability(model, protocol)
    if any(has_online_transform(linear) for _, linear in prepared.linears()):
        raise ConfigError("the model is prepared already, and a second transform would come on top: load it anew.")
    prepared.applied, prepared.earlier = apply_rotations(model, protocol, windows, progress, listener)
    return prepared


def require_capability(model: PreTrainedModel, protocol: Protocol) -> Prepared:
    """What is known of `model` before anything is done to it. Costs some forwards over a few tokens.

    Raises ModelError for linears without known roles, layers that have not exactly one MLP output (latent attention, xIELU),
    attention outputs that are not whole heads, and an attention that a quantised cache cannot reach; UnsupportedError for
    widths without a Hadamard matrix.
    """
    roles, kind = find_roles(model), type(model).__name__
    prepared = Prepared(model, roles, protocol, value_width(model))
    ends = {role: [(s, x) for s, x in prepared.linears() if s.role == role] for role in ("mlp-output", "attention-output")}
    for index, layer in enumerate(roles.layers):
        found = [site.path for site, _ in ends["mlp-output"] if site.layer == index]
        if len(found) != 1:
            raise ModelError(
                f"{layer} of {kind} has {len(found)} linears that look like the last one of an MLP, not one "
                f"({', '.join(found) or 'some activations hide it'}): it is not known what to quantise how (latent attention?)."
            )
    for site, linear in ends["attention-output"]:
        if linear.in_features % prepared.values:
            raise ModelError(
                f"{site.path} of {kind} reads {linear.in_features} channels, which are no whole heads of {prepared.values}."
            )
    for _, linear in ends["mlp-output"] if protocol.ffn_hadamard else ():
        construction(linear.in_features, NO_FFN)
    learning = learning_cache(model, protocol) if protocol.residual_rotation == "learned" else None
    for cache in (cache_quantizer(model, protocol), learning):
        if cache is not None:
            with changed_attention(model, cache):
                pass
    return prepared


@torch.no_grad()
def round_weights(prepared: Prepared, protocol: Protocol, listener: Listener = SILENT) -> None:
    """Round the decoder's linears to the nearest, in place."""
    prepared.require(protocol)
    prepared.protocol = protocol
    if protocol.weight_bits == 16:
        return
    start, total = time.perf_counter(), len(prepared.roles.sites)
    for done, (site, linear) in enumerate(prepared.linears(), start=1):
        scale, zero = weight_scales(linear.weight, protocol)
        linear.weight.copy_(round_weight(linear.weight, scale, zero, protocol))
        prepared.scales[site.path] = scale
        listener.progress("Rounding linears", done, total, time.perf_counter() - start)
