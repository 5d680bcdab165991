"""A decoder run one layer at a time: what its first layer gets, what else each layer gets, which linears read one tensor.

Whatever is fitted layer by layer (reconstruction, GPTQ) sends hidden states through one layer after the other and needs only
one of them at work. Letters: N sequences, T positions, D width.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.surgery.roles import decoder_layers


class Stopped(Exception):
    """Ends a forward whose rest nobody needs."""


@torch.no_grad()
def first_layer_inputs(model: PreTrainedModel, batches: Sequence[Tensor], precision: str) -> list[Tensor]:
    """What the first decoder layer gets, for each batch of token ids [N, T]: [N, T, D] in fp32 or bf16, on its device."""
    device, dtype = next(model.parameters()).device, torch.bfloat16 if precision == "bf16" else torch.float32
    found: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        found.append((arguments[0] if arguments else options["hidden_states"]).to(dtype))
        raise Stopped

    handle = decoder_layers(model)[0][1].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(Stopped), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                model(input_ids=batch.to(device), use_cache=False)
    finally:
        handle.remove()
    return found


@torch.no_grad()
def layer_calls(model: PreTrainedModel, batch: Tensor) -> list[dict[str, Any]]:
    """What else each decoder layer gets (masks, positions), which is the same for every batch of one shape."""
    found: list[dict[str, Any]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert len(arguments) <= 1, "decoder layers get all but the hidden states by name"
        found.append({name: value for name, value in options.items() if name != "hidden_states"})

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for _, layer in decoder_layers(model)]
    try:
        model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states among what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output
