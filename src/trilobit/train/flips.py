"""How many weights change their ternary code in one step, layer by layer: what is still learning, and what only trembles.

A latent near a rounding threshold is pushed across it and back for as long as the learning rate lets it (oscillation,
arXiv 2203.11086). One step is compared with the next rather than one evaluation with the one before, so that the number
does not depend on how often it is taken, nor on where a run was interrupted.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trilobit import quant
from trilobit.nn.ternary import TernaryLinear
from trilobit.surgery.roles import decoder_layers
from trilobit.tensors import whole

ROWS = 64  # of each matrix: a sample, at any model's size


def watch_flips(model: nn.Module) -> Callable[[], dict[str, list[float]]]:
    """Note the codes of the decoder's ternary linears now; the function returned gives `flips`, the share of codes in each
    layer that have changed since, on the first 64 rows of every matrix."""
    before = _codes(model)

    def flips() -> dict[str, list[float]]:
        shares = [
            sum(int((a != b).sum()) for a, b in zip(old, new, strict=True)) / max(1, sum(a.numel() for a in old))
            for old, new in zip(before, _codes(model), strict=True)
        ]
        return {"flips": [float(f"{share:.3g}") for share in shares]}

    return flips


@torch.no_grad()
def _codes(model: nn.Module) -> list[list[Tensor]]:
    """The codes of each layer's sampled rows, int8."""
    return [
        [_sample(module) for module in layer.modules() if isinstance(module, TernaryLinear)]
        for _, layer in decoder_layers(model)
    ]


def _sample(linear: TernaryLinear) -> Tensor:
    weight, granularity = whole(linear.weight), linear.rule.granularity
    rows = weight[:ROWS]
    if linear.ranges is not None:
        scale = quant.learned_scale(whole(linear.ranges))[:ROWS]
    else:
        scale = quant.absmean_scale(weight if granularity == "tensor" else rows, granularity)
    return quant.ternary_codes(rows, scale, granularity)
