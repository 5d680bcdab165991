"""What it costs to quantise one decoder layer alone: how much of the ramp each deserves.

    Δ_l = loss with λ = 1 in layer l and 0 elsewhere − loss with λ = 0 everywhere        nats per token, before training

On SmolLM2-135M with equal ramps the first two layers and the last two cost 3 nats each while they fade in, all others
together half a nat (docs/LOG.md, 2026-11-24).
"""

import copy

from torch import Tensor
from transformers import PreTrainedModel

from trilobit.measure.perplexity import nats
from trilobit.surgery.roles import decoder_layers
from trilobit.surgery.ternary import Plan, apply_plan, set_gains, set_strengths


def layer_costs(model: PreTrainedModel, plan: Plan, gains: dict[str, float], windows: Tensor, sequences: int) -> list[float]:
    """Δ of every layer, measured on a copy of the original `model`. windows: token ids [N, T + 1]; one pass per layer."""
    ternary = copy.deepcopy(model)
    apply_plan(ternary, plan)
    set_gains(ternary, gains)
    layers = len(decoder_layers(ternary))

    def loss(alone: int | None) -> float:
        strengths = [float(layer == alone) for layer in range(layers)]
        set_strengths(ternary, strengths, strengths)
        total, count = nats(ternary, windows, sequences)
        return total / count

    base = loss(None)
    return [loss(layer) - base for layer in range(layers)]
