"""Attention sinks: how much attention goes to the first position, whatever stands there (arXiv 2309.17453).

    share of a layer = Σ_{heads, i ≥ 1} a_{i,0} / Σ_{heads, i ≥ 1, j} a_{i,j}

Only the eager implementation has the weights a. Each layer's are looked at as they leave its attention module, which is
whatever module inside the layer returns a tuple with [1, heads, T, T] in second place, and are gone before the next
layer's come: `output_attentions` would keep them all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.infer.quiet import quiet_transformers
from trilobit.surgery.roles import decoder_layers, evaluating

SINK_SEQUENCES, SINK_LENGTH = 8, 1024  # at most: 32 heads are 134 MB of fp32 a layer


def sink_shares(model: PreTrainedModel, windows: Tensor) -> list[float | None] | None:
    """By layer, over the beginning [N ≤ 8, T ≤ 1024] of `windows`; None where a layer, or all, give no attention weights."""
    windows = windows[:SINK_SEQUENCES, :SINK_LENGTH].to(next(model.parameters()).device)
    layers = decoder_layers(model)
    sums = torch.zeros(len(layers), 2, dtype=torch.float64, device=windows.device)
    seen: set[int] = set()
    handles = []

    def watch(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if layer in seen or not isinstance(weights, Tensor) or weights.ndim != 4:
                return
            if weights.shape[-2:] == (windows.shape[1],) * 2:
                seen.add(layer)  # a wrapper around the module returns the same
                later = weights[:, :, 1:]
                sums[layer] += torch.stack([later[..., 0].sum(dtype=torch.float64), later.sum(dtype=torch.float64)])

        return look

    for index, (_, layer) in enumerate(layers):
        handles += [module.register_forward_hook(watch(index)) for module in layer.modules()]
    given: set[int] = set()
    try:
        with _eager(model), evaluating(model):
            for window in windows:
                seen.clear()
                model.base_model(input_ids=window[None], use_cache=False)
                given |= seen
    finally:
        for handle in handles:
            handle.remove()
    shares = [first / total if index in given else None for index, (first, total) in enumerate(sums.tolist())]
    return shares if given else None


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention with weights where the model can, then what it had before."""
    before = model.config._attn_implementation
    with quiet_transformers():  # it warns where it cannot
        with suppress(ValueError, ImportError):
            model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(before or "eager")
