import copy

import pytest
import torch

from families import build
from trilobit.measure.perplexity import nats
from trilobit.nn.ternary import TernaryLinear
from trilobit.surgery.roles import decoder_layers, find_roles
from trilobit.surgery.ternary import TernarySpec, apply_plan, make_plan, set_gains
from trilobit.train.sensitivity import layer_costs


def test_costs_are_the_losses_of_one_layer_alone() -> None:
    """Each number is the loss with that layer's linears quantised and no other, above the loss with none; the model that is
    measured stays as it was."""
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far enough from uniform that quantising matters
    before = copy.deepcopy(model.state_dict())
    plan = make_plan(find_roles(model), TernarySpec())
    gains = {path: 0.5 + index for index, path in enumerate(plan.linears)}
    windows = torch.randint(0, model.config.vocab_size, (3, 17))
    found = layer_costs(model, plan, gains, windows, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply_plan(model, plan)
    set_gains(model, gains)
    losses = []
    for alone in [None, *range(len(decoder_layers(model)))]:
        for index, (_, layer) in enumerate(decoder_layers(model)):
            for module in layer.modules():
                if isinstance(module, TernaryLinear):
                    module.set_strength(float(index == alone), float(index == alone))
        total, count = nats(model, windows, 3)
        losses.append(total / count)
    assert found == pytest.approx([loss - losses[0] for loss in losses[1:]], abs=1e-5)
    assert max(map(abs, found)) > 1e-3
