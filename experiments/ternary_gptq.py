"""Post-training ternary weights without training: rounding to nearest, and GPTQ with three levels. Scales per group of 128.

    RTN     Q = s · code(W / s)
    GPTQ    min ‖(W − Q) X‖²: columns are quantised one after the other, and each one's error is paid for by those to come

                H = Σ x xᵀ + damping · mean(diag) · I,    H⁻¹ = Uᵀ U with U upper triangular
                q_j = s · code(w_j / s),    w_k ← w_k − (w_j − q_j) · U_jk / U_jj    for k > j

GPTQ (Frantar et al. 2022, arXiv 2210.17323) was published for uniform grids of two bits and more. Taken from the paper:
the update, the Cholesky form, lazy updates by blocks (one block is one group here), damping of 1 % of the mean diagonal,
columns in their own order, layers in order on inputs that are quantised already; within a layer likewise (q, k, v, then o,
then gate, up, then down), as its authors' later `true-sequential`. Ours: the ternary grid. A group's scale is fixed from
what its weights have become when the group begins, by one of two rules:

    absmean   quant.py's: the mean of |w|
    mse       the scale with the least squared error, exactly: with |w| sorted downwards, the best k non-zero codes have
              s = mean of the k largest, and the error falls by k·s²; try every k (TWN, arXiv 1605.04711, does so under a
              distribution)

Both are rounded to fp16, as quant.py does. Where H cannot be factorised, damping is raised tenfold until it can.

Letters: O outputs, K inputs, G groups of a row, N sequences, T positions, D width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.fourbit.gptq import inverse_factor
from trilobit.fourbit.gptq_layers import input_moment
from trilobit.quant import FLOOR, absmean_scale, group_size, ternary_dequantize, ternary_levels
from trilobit.surgery.layerwise import first_layer_inputs, hidden_states_of, layer_calls
from trilobit.surgery.roles import decoder_layers
from trilobit.train.loop import autocast

Rule = Literal["absmean", "mse"]
GRANULARITY = "group-128"
GROUP = group_size(GRANULARITY) or 0
DAMPING = 0.01


def group_scale(weight: Tensor, rule: Rule) -> Tensor:
    """The scale of each row of one group, fp16-rounded: [O, k] → [O, 1]."""
    assert weight.shape[1] <= GROUP, weight.shape
    if rule == "absmean":
        return absmean_scale(weight, GRANULARITY)
    sums = weight.abs().double().sort(dim=1, descending=True).values.cumsum(dim=1)
    counts = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    best = (sums.square() / counts).argmax(dim=1, keepdim=True)
    scale = sums.gather(1, best) / counts[best]
    return scale.clamp(min=FLOOR).to(torch.float16).to(weight.dtype)


def round_to_nearest(weight: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Codes [O, K] int8 and scales [O, G]."""
    groups = weight.detach().split(GROUP, dim=1)
    scales = [group_scale(group, rule) for group in groups]
    codes = [ternary_levels(group, scale, "row") for group, scale in zip(groups, scales, strict=True)]
    return torch.cat(codes, dim=1).to(torch.int8), torch.cat(scales, dim=1)


def quantize_columns(weight: Tensor, moment: Tensor, rule: Rule, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Codes [O, K] int8 and scales [O, G] of `weight` [O, K] for inputs with Σ x xᵀ = `moment` [K, K]."""
    upper = inverse_factor(moment, damping)[0].to(weight.dtype)
    weight = weight.detach().clone()
    codes, scales = torch.empty_like(weight, dtype=torch.int8), []
    for start in range(0, weight.shape[1], GROUP):
        end = min(start + GROUP, weight.shape[1])
        scale = group_scale(weight[:, start:end], rule)
        errors = weight.new_zeros(len(weight), end - start)
        for j in range(start, end):
            level = ternary_levels(weight[:, j : j + 1], scale, "row")
            error = (weight[:, j : j + 1] - level * scale) / upper[j, j]
            weight[:, j + 1 : end] -= error * upper[j, j + 1 : end]
            codes[:, j : j + 1], errors[:, j - start : j - start + 1] = level.to(torch.int8), error
        weight[:, end:] -= errors @ upper[start:end, end:]
        scales.append(scale)
    return codes, torch.cat(scales, dim=1)


def linears_by_input(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> list[list[nn.Linear]]:
    """The linears of a decoder layer in the order they run, those that read the same tensor together."""
    found: list[tuple[Tensor, list[nn.Linear]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        if found and found[-1][0] is inputs[0]:
            found[-1][1].append(module)
        else:
            found.append((inputs[0], [module]))

    handles = [m.register_forward_pre_hook(note) for m in layer.modules() if isinstance(m, nn.Linear)]
    layer(x, **options)
    for handle in handles:
        handle.remove()
    return [linears for _, linears in found]


@torch.no_grad()
def gptq(model: PreTrainedModel, batches: Sequence[Tensor], rule: Rule, precision: str) -> int:
    """Make the linears of the decoder layers of `model` ternary, in place. Returns tokens × layers, forward only.

    batches: token ids [N, T], all of one shape. Weights stay floating point, with three values a group.
    """
    device = next(model.parameters()).device
    states, calls, passes = first_layer_inputs(model, batches, precision), layer_calls(model, batches[0]), 0
    for (_, layer), options in zip(decoder_layers(model), calls, strict=True):

        def run(x: Tensor, layer: nn.Module = layer, options: dict[str, Any] = options) -> Tensor:
            with autocast(precision, device):
                return hidden_states_of(layer(x.to(device), **options)).to(x.dtype)

        for together in linears_by_input(layer, states[0].to(device, layer_dtype(layer)), options):
            moment = input_moment(together[0], states, run)
            passes += 1
            for linear in together:
                store(linear, *quantize_columns(linear.weight, moment, rule))
        states = [run(x) for x in states]
        passes += 1
    return passes * sum(batch.numel() for batch in batches)


@torch.no_grad()
def rtn(model: PreTrainedModel, rule: Rule) -> None:
    """Round the linears of the decoder layers of `model` to the nearest ternary matrix, in place."""
    for _, layer in decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                store(module, *round_to_nearest(module.weight, rule))


@torch.no_grad()
def store(linear: nn.Linear, codes: Tensor, scale: Tensor) -> None:
    """Give `linear` the weight code · s. codes: [O, K] int8 in {−1, 0, 1}; scale: [O, G], values of fp16."""
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= 1, codes.dtype
    assert torch.equal(scale, scale.to(torch.float16).to(scale.dtype)), "scales are stored as fp16"
    linear.weight.copy_(ternary_dequantize(codes, scale, GRANULARITY))


def layer_dtype(layer: nn.Module) -> torch.dtype:
    return next(layer.parameters()).dtype
