"""The warm start: what each layer is trained on, towards what, and that it helps."""

import copy

import pytest
import torch

from families import FAMILIES, build
from trilobit.surgery.roles import decoder_layers
from trilobit.surgery.ternary import TernarySpec, set_strengths, ternarize
from trilobit.train.reconstruct import reconstruct

BATCHES = [torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(4)] * 10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_comes_nearer_the_original(family: str) -> None:
    """In every family each ternary layer ends nearer the original's output than it began, and so do the logits."""
    model = build(family)
    original = copy.deepcopy(model).requires_grad_(False).eval()
    ternarize(model, TernarySpec(placement="every"), calibration=BATCHES[:2])
    untrained = copy.deepcopy(model)
    heard: list[int] = []
    found = reconstruct(model, original, BATCHES, 3e-3, "fp32", lambda layer, before, after: heard.append(layer))
    assert heard == list(range(len(decoder_layers(model))))
    assert all(after < before for before, after in zip(found.before, found.after, strict=True)), found
    with torch.no_grad():
        truth, start, end = (m(input_ids=BATCHES[0], use_cache=False).logits for m in (original, untrained, model))
    assert (end - truth).norm() < 0.9 * (start - truth).norm()


def test_layers_see_the_student_and_aim_at_the_original() -> None:
    """Without quantisation and norms every layer is the original's already: nothing is to learn, so inputs, masks, positions
    and targets are those of a whole forward."""
    model = build("llama")
    original = copy.deepcopy(model).requires_grad_(False).eval()
    ternarize(model, TernarySpec(placement="none"))
    layers = len(decoder_layers(model))
    set_strengths(model, [0.0] * layers, [0.0] * layers)
    found = reconstruct(model, original, BATCHES[:3], 1e-9, "fp32")
    assert max(found.before + found.after) < 1e-10
    damaged = copy.deepcopy(original)
    with torch.no_grad():
        decoder_layers(damaged)[0][1].mlp.down_proj.weight.add_(0.1)  # pyright: ignore
    found = reconstruct(damaged.requires_grad_(True), original, BATCHES[:3], 1e-12, "fp32")
    assert all(error > 1e-6 for error in found.after), "what an early layer does wrong reaches the later ones' inputs"
