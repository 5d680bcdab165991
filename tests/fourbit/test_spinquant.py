"""Cayley steps stay orthogonal, the loss is that of the turned and quantised model, and learning lowers it."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from exact import exact
from families import build, tokens
from trilobit.errors import DataError, ModelError, NonFiniteError
from trilobit.fourbit.online import attach_ffn_hadamard
from trilobit.fourbit.quarot import matrix, random_rotation
from trilobit.fourbit.spinquant import LearnedRotation, cayley_step, learn, quantised_loss, straight_through
from trilobit.nn.outlier_safe import random_orthogonal
from trilobit.surgery.roles import find_sites
from trilobit.surgery.rotate import rotate
from trilobit.surgery.stream import find_stream

WIDTH = 32


def four_bits(x: Tensor) -> Tensor:
    """Asymmetric, per row, 16 levels."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-9)
    return ((x - low) / scale).round() * scale + low


def bend(x: Tensor) -> Tensor:
    """Not a turn and not a rounding: differs in every coordinate system, and no level flips at its last bit."""
    return x + 0.3 * torch.sin(3 * x)


def identity(x: Tensor) -> Tensor:
    return x


def turn(seed: int = 2) -> Tensor:
    return random_orthogonal(WIDTH, torch.Generator().manual_seed(seed))


def stock_loss(model: PreTrainedModel, windows: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten()).item()


def orthogonal(rotation: Tensor, atol: float) -> bool:
    return torch.allclose(rotation @ rotation.T, torch.eye(len(rotation)).to(rotation), rtol=0, atol=atol)


def planted() -> tuple[PreTrainedModel, Tensor]:
    """A model with an outlier channel in its residual stream, for which its norms have small gains, as real ones have;
    trained for some seconds on chains of tokens with four successors each. And windows of the same chains."""
    model = build("llama", num_hidden_layers=2, initializer_range=0.1)
    generator = torch.Generator().manual_seed(4)
    successors = torch.randint(0, 97, (97, 4), generator=generator)

    def sample(count: int) -> Tensor:
        windows = torch.randint(0, 97, (count, 1), generator=generator)
        for _ in range(23):
            drawn = successors[windows[:, -1]].gather(1, torch.randint(0, 4, (count, 1), generator=generator))
            windows = torch.cat([windows, drawn], 1)
        return windows

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 8
        for norm in find_stream(model).norms:
            model.get_submodule(norm).weight.fill_(4)
            model.get_submodule(norm).weight[5] = 0.02
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        batch = sample(32)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, sample(48)


@pytest.fixture(scope="module")
def made() -> tuple[PreTrainedModel, Tensor]:
    """`planted` once, with one seed; tests take copies of it."""
    torch.manual_seed(0)
    return planted()


@pytest.mark.parametrize("width", [2, 12, 33])
def test_cayley_steps_stay_orthogonal_and_descend(width: int) -> None:
    """Three hundred steps down ⟨C, R⟩ keep R Rᵀ = I to 1e-12 and come close to the least value, minus the nuclear norm of C."""
    torch.manual_seed(width)
    target, rotation = torch.randn(width, width, dtype=torch.float64), random_orthogonal(width)
    if torch.linalg.det(-target) * torch.linalg.det(rotation) < 0:
        target[0] *= -1  # steps cannot leave the component of the orthogonal matrices that they start in
    start = (target * rotation).sum()
    for _ in range(300):
        rotation = cayley_step(rotation, target, 0.2)
    assert orthogonal(rotation, 1e-12)
    least = -torch.linalg.matrix_norm(target, "nuc")
    assert (target * rotation).sum() - least < 0.05 * (start - least)


def test_a_step_is_bounded_and_zero_stays() -> None:
    """A gradient of any size moves R by at most the bound; none leaves it; lr scales what is below the bound."""
    rotation = turn()
    huge = cayley_step(rotation, torch.randn(WIDTH, WIDTH, dtype=torch.float64) * 1e30, 1.5)
    assert orthogonal(huge, 1e-12) and (huge - rotation).norm() < WIDTH**0.5
    assert torch.allclose(cayley_step(rotation, torch.zeros(WIDTH, WIDTH), 1.5), rotation, atol=1e-14)
    small = torch.randn(WIDTH, WIDTH, dtype=torch.float64) * 1e-6
    one, two = (cayley_step(rotation, small, lr) - rotation for lr in (1.0, 2.0))
    assert torch.allclose(two, 2 * one, rtol=1e-3, atol=1e-9)


class RoundThrough(torch.autograd.Function):
    """round, with the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore
        return gradient


def test_gradients_of_rounding() -> None:
    """With ranges: the gradient of the same quantiser written with a rounding that passes it. Without: that of x."""

    def differentiable(x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return RoundThrough.apply((x - low) / ((high - low) / 15)) * (high - low) / 15 + low

    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 32, dtype=torch.float64)
    for through_ranges in (True, False):
        y = straight_through(x, four_bits, through_ranges)
        assert torch.allclose(y, four_bits(x.detach()), rtol=0, atol=1e-14)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        (exact,) = torch.autograd.grad(differentiable(x), x, upstream) if through_ranges else (upstream,)
        assert torch.allclose(gradient, exact, atol=1e-12)
    flat = torch.ones(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(straight_through(flat, four_bits).sum(), flat)
    assert torch.equal(gradient, torch.ones(2, 8))


@pytest.mark.parametrize("weights", [None, identity])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False), ("phi3", False)])
def test_nothing_quantised_is_the_model(family: str, tied: bool, weights) -> None:
    """Whatever the turn, without quantisation the loss is the model's own."""
    model = exact(build(family, tied=tied, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {})))
    found = quantised_loss(model, tokens(), turn(), identity, weights)
    assert found == pytest.approx(stock_loss(model, tokens()), rel=1e-6)


@pytest.mark.parametrize("weights", [None, bend])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_the_loss_is_that_of_the_rotated_model(family: str, weights) -> None:
    """What is learned on is what `rotate` makes, with every decoder linear's input (and weight) quantised."""
    model = build(family, head_dim=8, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {})).double()
    attach_ffn_hadamard(model)  # before or after a turn of the stream: part of what is learned on
    rotated = copy.deepcopy(model)
    rotate(rotated, turn())
    for site in find_sites(rotated):
        linear = rotated.get_submodule(site.path)
        if weights is not None:
            linear.weight.data = weights(linear.weight.data)
        linear.register_forward_pre_hook(lambda m, inputs: (bend(inputs[0]),))
    found = quantised_loss(model, tokens(), turn(), bend, weights)
    assert found == pytest.approx(stock_loss(rotated, tokens()), rel=1e-5)
    assert found != pytest.approx(stock_loss(model, tokens()), rel=1e-3)
    assert found != pytest.approx(quantised_loss(model, tokens(), turn(7), bend, weights), rel=1e-4)


def test_learning_beats_random_rotations(made) -> None:
    """With an outlier planted, turning makes 4 bits cheaper, and learning takes off a third of what the best of eight random
    turns still costs."""
    model, windows = made
    train, held_out = windows[:32], windows[32:]
    learned = learn(model, train, quantise_activations=four_bits, steps=80, batch=16, through_ranges=True)

    def loss(rotation: Tensor | None, on: Tensor) -> float:
        return quantised_loss(model, on, rotation, four_bits)

    random = [loss(matrix(random_rotation(WIDTH, seed)), train) for seed in range(8)]
    assert max(random) < loss(None, train) - 0.1
    full = quantised_loss(model, train, None, identity)
    assert loss(learned.matrix, train) - full < 0.67 * (min(random) - full)
    assert loss(learned.matrix, held_out) < loss(matrix(random_rotation(WIDTH, 0)), held_out)
    assert orthogonal(learned.matrix, 1e-6)
    assert (learned.steps, learned.tokens, learned.skipped, len(learned.losses)) == (80, 80 * 16 * 24, 0, 80)
    assert "80 steps, 30,720 tokens, lr 1.5, seed 0" in learned.rotation.description


def test_a_seed_means_one_rotation(made) -> None:
    """The same seed learns the same matrix, another one another."""
    model, windows = made
    first, again, other = (
        learn(model, windows, quantise_activations=four_bits, steps=2, batch=2, seed=seed).matrix for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_model_is_left_as_it_was(made) -> None:
    """Weights, gradients, requires_grad, modes and hooks; also where learning fails."""
    model, windows = copy.deepcopy(made)
    model.train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(model, windows, quantise_activations=four_bits, quantise_weights=four_bits, steps=1, batch=2)
    for broken in ({"quantise_activations": lambda x: x / (1 // 0)}, {"quantise_weights": lambda x: x / (1 // 0)}):
        with pytest.raises(ZeroDivisionError):
            learn(model, windows, **{"quantise_activations": four_bits, **broken}, steps=1, batch=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_not_finite_is_skipped_or_ends_it(made) -> None:
    """A step that is not finite leaves R alone and is counted; ten in a row raise, with advice."""
    model, windows = made
    calls = 0

    def sometimes(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full_like(x, math.nan) if calls < 5 else four_bits(x)

    learned = learn(model, windows, quantise_activations=sometimes, steps=4, batch=1)
    assert learned.skipped == 1 and math.isnan(learned.losses[0]) and math.isfinite(learned.losses[1])
    assert orthogonal(learned.matrix, 1e-6)
    with pytest.raises(NonFiniteError, match=r"10 steps in a row.*quarot"):
        learn(model, windows, quantise_activations=lambda x: x * math.inf, steps=30, batch=1)


def test_bad_input() -> None:
    """Windows too short or of a wrong shape, and models whose stream cannot be turned."""
    model = build("llama")
    for windows in (torch.zeros(3, 1, dtype=torch.long), torch.zeros(0, 9, dtype=torch.long), torch.zeros(9, dtype=torch.long)):
        with pytest.raises(DataError, match=r"takes \[N, T\]"):
            learn(model, windows, quantise_activations=four_bits)
    with pytest.raises(ModelError, match="norm behind the block"):
        learn(build("gemma3_text"), tokens(), quantise_activations=four_bits)


def test_learning_that_made_its_loss_worse_says_so(made) -> None:
    """It is said of the first step's sequences, before and at the end (old code: of the first and last steps' own, which with
    one sequence a step are two texts, of which the harder one came last)."""

    def learned(after: float, *losses: float) -> LearnedRotation:
        return LearnedRotation(torch.eye(2, dtype=torch.float64), losses, len(losses), 1, 1.5, 0, 0, after)

    assert "LEARNING MADE ITS LOSS WORSE" in learned(3.1, 3.0, math.nan, 2.0).rotation.description
    assert not learned(2.9, 3.0, 4.0).worsened and not learned(2.9, math.nan).worsened
    model, windows = made
    found = learn(model, windows, quantise_activations=four_bits, steps=3, batch=1, seed=4)
    first = torch.randperm(len(windows), generator=torch.Generator().manual_seed(4))[:1]
    for rotation, expected in ((matrix(random_rotation(WIDTH, 4)), found.losses[0]), (found.matrix, found.after)):
        assert quantised_loss(model, windows[first], rotation, four_bits) == pytest.approx(expected, rel=1e-5)
