"""experiments/catq.py against the paper's equations."""

from itertools import pairwise

import pytest
import torch
from catq import Catq, CatqLinear, catq, harden, soften, windows
from ternary_gptq import rtn
from torch import nn

from families import build
from trilobit.surgery.roles import decoder_layers


def linear(outputs: int = 6, inputs: int = 300) -> CatqLinear:
    """A linear with factors and a low-rank part that are not those of the start."""
    module = CatqLinear(nn.Linear(inputs, outputs), 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.factors.normal_(std=0.3)
        module.up.normal_(std=0.1)
    return module


def test_windows_are_the_published_ones():
    """Four layers moved by two, one layer more at a time at both ends; every layer is in one, whatever the depth."""
    found = [(w.start, w.stop) for w in windows(12)]
    assert found == [(0, 1), (0, 2), (0, 3), (0, 4), (2, 6), (4, 8), (6, 10), (8, 12), (9, 12), (10, 12), (11, 12)]
    for layers in range(1, 40):
        plan = windows(layers)
        assert {index for window in plan for index in window} == set(range(layers))
        assert all(a.start <= b.start <= a.stop for a, b in pairwise(plan))
    assert sum(map(len, windows(30))) == 68


def test_the_transition_goes_from_the_identity_to_three_levels():
    """f is x for a small sharpness and the hard code for a large one, away from the threshold."""
    x, threshold = torch.linspace(-1, 1, 41), torch.tensor(0.43)
    torch.testing.assert_close(soften(x, 1e-2, threshold), x, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(soften(x, 1e3, threshold), harden(x, threshold))


def test_modulation_is_that_of_the_equations():
    """ŵ, α, Δ of a short last group, from its own weights alone."""
    module = linear()
    x, scale, threshold = module.modulated()
    weight = (module.original.weight + module.up @ module.down / 4)[:, 256:]
    mean = weight.mean(dim=1, keepdim=True)
    spread = (weight - mean).abs().mean(dim=1, keepdim=True)
    a, b, c = module.factors[:, :, 2]
    alpha = 2 * b.sigmoid() * spread
    shifted = mean + (2 * a.sigmoid() - 1) * spread
    torch.testing.assert_close(scale[:, 2], alpha, rtol=1e-3, atol=0)
    torch.testing.assert_close(x[:, 2, :44], (weight - shifted) / alpha, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(threshold[:, 2], 2 * c.sigmoid() * 0.5)


def test_the_hard_stage_has_the_soft_gradient():
    """Its values are ternary; what acts through the codes alone, the threshold, has the transition function's gradient."""
    module = linear()
    module.sharpness = 30.0
    gradients = []
    for module.hard in (False, True):
        module.zero_grad()
        (module.weight() * torch.linspace(-1, 1, 300)).sum().backward()
        assert module.factors.grad is not None
        gradients.append(module.factors.grad[2].clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)
    assert all(len(group.abs().unique()) <= 2 for row in module.weight() for group in row.split(128))


def test_what_is_stored_is_what_was_trained():
    """The finished linear has the hard weight, its scales rounded to fp16."""
    module = linear()
    expected = module.weight().detach()
    torch.testing.assert_close(module.finished().weight, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("restart", [True, False])
def test_a_model_becomes_ternary_and_stays_nearer_than_rounded(restart):
    """Windows leave ordinary linears with three values a group, whose logits are nearer to the original's than RTN's."""
    ids = torch.randint(3, 60, (32, 16))
    models = [build("llama") for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    seen = []
    settings = Catq(rate=0.02, low_rank_rate=0.02, epochs=4, restart=restart)
    cost = catq(models[1], list(ids.split(4)), settings, "fp32", lambda window, first, last: seen.append(window))
    rtn(models[2], "mse")
    layers = len(decoder_layers(models[0]))
    assert seen == windows(layers) and cost.trained == 4 * 32 * 16 * sum(map(len, seen))
    inside = [m for _, layer in decoder_layers(models[1]) for m in layer.modules() if isinstance(m, nn.Linear)]
    assert len(inside) == 7 * layers and all(type(m) is nn.Linear for m in inside)
    assert all(len(group.abs().unique()) <= 2 for m in inside for row in m.weight for group in row.split(128))
    with torch.no_grad():
        wanted, near, far = (model(input_ids=ids).logits for model in models)
    assert (near - wanted).square().sum() < (far - wanted).square().sum()
