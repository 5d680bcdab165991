"""A warm start: each decoder layer, one after the other, learns to give the original layer's output.

Layer l of the student gets what the student's layers before it make of a text, already quantised, and is trained at λ = 1
towards what the original's layer l makes of the same text, so that each layer also mends what went wrong before it:

    L_l = mean over tokens of ‖f_l(x) − f*_l(x*)‖² / ‖f*_l(x*)‖²        x: student's hidden states, x*: the original's

Relative per token, because a few tokens have hidden states a thousand times the others'. Every token goes forward and
back once through each layer, as in a training step, but nothing goes through the head, only one layer has gradients and
optimizer state at a time, and the original is used one layer at a time. Close to block-wise reconstruction in
post-training quantisation (BRECQ, arXiv 2102.05426; CAT-Q's windows), but with straight-through latents.

Letters: N sequences, T positions, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.surgery.layerwise import first_layer_inputs, hidden_states_of, layer_calls
from trilobit.surgery.roles import decoder_layers
from trilobit.train.loop import BETAS, autocast


@dataclass(frozen=True)
class Reconstruction:
    """How far each layer's output was from the original's, relative to it: before and after its training."""

    before: list[float]
    after: list[float]


def reconstruct(
    model: PreTrainedModel, original: PreTrainedModel, batches: Sequence[Tensor], lr: float, precision: str,
    after_layer: Callable[[int, float, float], None] = lambda layer, before, after: None,
) -> Reconstruction:  # fmt: skip
    """Train the decoder layers of `model` (ternary, at the λ it has), in place, against those of `original`.

    batches: token ids [N, T], all of one shape, each seen once by every layer; the rate falls linearly from `lr` to 0 over
    each layer's batches. Holds the hidden states of all batches, twice, in bf16 or fp32 as `precision` says. `after_layer`
    hears of each layer: its index, the relative error of its first and its last eighth of batches.
    """
    device = next(model.parameters()).device
    states, targets = (first_layer_inputs(side, batches, precision) for side in (model, original))
    call = layer_calls(model, batches[0])
    found = Reconstruction([], [])
    for index, ((_, layer), (_, reference)) in enumerate(zip(decoder_layers(model), decoder_layers(original), strict=True)):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
        errors = []
        for step, (x, target) in enumerate(zip(states, targets, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / len(batches))
            with autocast(precision, device):
                with torch.no_grad():
                    wanted = hidden_states_of(reference(target.to(device), **call[index]))
                error = _relative_error(hidden_states_of(layer(x.to(device), **call[index])), wanted)
            error.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            targets[step] = wanted.to(target.dtype)
            errors.append(error.detach())
        part = max(1, len(errors) // 8)
        found.before.append(torch.stack(errors[:part]).mean().item())
        found.after.append(torch.stack(errors[-part:]).mean().item())
        with torch.no_grad(), autocast(precision, device):
            for step, x in enumerate(states):
                states[step] = hidden_states_of(layer(x.to(device), **call[index])).to(x.dtype)
        after_layer(index, found.before[-1], found.after[-1])
    return found


def _relative_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ‖o − w‖² / ‖w‖². Both [N, T, D]."""
    output, wanted = output.float(), wanted.float()
    return ((output - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1).clamp(min=1e-6)).mean()
