"""CAT-Q (arXiv 2606.26650, ICML 2026): ternary weights by reconstructing windows of decoder layers. Training is ours.

Each group of 128 weights w has a shift μ, a scale α and a threshold Δ, all three learned around what the weights give:

    ŵ = (w − μ) / α,   μ = μ₀ + δμ·α₀,   α = δα·α₀,   Δ = δΔ·½,        μ₀ = mean(w), α₀ = mean|w − μ₀|
    δμ = 2σ(a) − 1,  δα = 2σ(b),  δΔ = 2σ(c),   a = b = c = 0 at the start;   stored: α · code, without μ

    soft     f(ŵ; s, Δ) = (tanh s(ŵ − Δ) + tanh s(ŵ + Δ)) / (2 tanh s),    s = s₀ · t/γ    while t ≤ γ   (identity → ternary)
    hard     code = sign(ŵ) where |ŵ| > Δ, else 0;  the gradient stays that of f at s₀       while t > γ

A window's layers learn a, b, c and a low-rank change of w (w + B·A / r, merged before it is made ternary) together, so
that the window's output is the original's. t runs from 0 to 1 over the window's training.

Takes from the paper: all of the above; γ = 0.8, s₀ = 30, Δ₀ = 0.5; AdamW, linear decay to zero; groups of 128; 512 samples
(1 M tokens), 60 epochs a window, batches of 3. From the configurations beside its published checkpoints: sigmoids; rank 64
on every projection; Huber loss; gradients clipped at 1; windows of 4 layers, moved by 2, one layer more at a time at both
ends (`windows`); student on quantised inputs, target the original's output on its own inputs. Rates there are 0.0015 to
0.008 for the three factors and a fifth of that for A and B; times their batch sizes that is 0.014 to 0.016 and 0.0024 to
0.0032 for all dense models, and the framework it extends (SliderQuant, arXiv 2603.25284) multiplies rates by batch sizes.
From SliderQuant's code: no weight decay, A drawn as nn.Linear draws, B zero, 1/r in front, samples reshuffled every epoch.

Could not know (training code is not released): the Huber δ (1 here; errors are far smaller, so that it is half the
squared error); whether a layer that was in an earlier window softens again (`restart`: here it does, the other way was far
worse); whether gradients run through μ₀ and α₀ (here they do); the parameter `phi_x_n` = 3; AdamW's betas (torch's); whether
t moves by epoch (here by step: there are fewer epochs); whether rates really are multiplied by batch sizes.
Ours to choose, because sixty epochs are not affordable here: epochs, batch, rates; experiments/post_training.py says how.

Letters: O outputs, K inputs, G groups of a row, g weights of a group, R rank, S samples, T positions, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from ternary_gptq import GROUP, store
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.quant import FLOOR
from trilobit.surgery.layerwise import first_layer_inputs, hidden_states_of, layer_calls
from trilobit.surgery.roles import decoder_layers
from trilobit.train.loop import autocast

WINDOW, STRIDE = 4, 2


@dataclass(frozen=True, kw_only=True)
class Catq:
    """What can be chosen. Defaults are the published ones where there are any, but for `epochs`."""

    rate: float = 0.015
    """Of the three factors."""
    low_rank_rate: float = 0.003
    rank: int = 64
    epochs: int = 60
    softened: float = 0.8
    sharpness: float = 30.0
    huber: float = 1.0
    restart: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """Tokens × layers: with gradients, and forward only (targets, and moving both streams on)."""

    trained: int
    forward: int


def windows(layers: int, size: int = WINDOW, stride: int = STRIDE) -> list[range]:
    """The layers of each window: 0, 0–1, 0–2, … at the start, `size` layers moved by `stride`, mirrored at the end."""
    size = min(size, layers)
    starts = [range(k) for k in range(1, size + 1)]
    rounds = math.ceil((layers - 2 * size) / stride) + 1 if layers > size else 0
    middle = [range(first, min(first + size, layers)) for first in range(stride, stride * (rounds + 1), stride)]
    ends = [range(layers - k, layers) for k in range(size, 0, -1)]
    found = [*starts, *middle, *ends]
    return [window for window, after in pairwise([*found, range(0)]) if window != after]


def soften(x: Tensor, sharpness: float, threshold: Tensor) -> Tensor:
    """f(x; s, Δ): the identity as s → 0, three levels as s → ∞."""
    both = torch.tanh(sharpness * (x - threshold)) + torch.tanh(sharpness * (x + threshold))
    return both / (2 * math.tanh(sharpness))


def harden(x: Tensor, threshold: Tensor) -> Tensor:
    return x.sign() * (x.abs() > threshold)


class CatqLinear(nn.Module):
    """A linear whose weight is on its way to ternary. Its own weight is fixed; `sharpness` is s, `hard` the last stage."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.original = linear
        outputs, inputs = linear.weight.shape
        self.size = min(GROUP, inputs)
        groups = math.ceil(inputs / self.size)
        rank = min(rank, outputs, inputs)
        device = linear.weight.device
        self.factors = nn.Parameter(torch.zeros(3, outputs, groups, 1, device=device))
        """a, b, c of shift, scale and threshold."""
        bound = inputs**-0.5
        drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(drawn.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.register_buffer("inside", self._grouped(torch.ones(1, inputs, device=device)), persistent=False)
        self.sharpness, self.hard, self.exact = 1.0, True, False

    def _grouped(self, weight: Tensor) -> Tensor:
        """[O, K] → [O, G, g], zeros at the end of a short last group."""
        return F.pad(weight, (0, -weight.shape[1] % self.size)).unflatten(1, (-1, self.size))

    def modulated(self) -> tuple[Tensor, Tensor, Tensor]:
        """ŵ [O, G, g], α and Δ [O, G, 1]."""
        inside = self.get_buffer("inside")
        count = inside.sum(dim=2, keepdim=True)
        weight = self.original.weight + self.up @ self.down / len(self.down)
        grouped = self._grouped(weight)
        mean = grouped.sum(dim=2, keepdim=True) / count
        spread = ((grouped - mean).abs() * inside).sum(dim=2, keepdim=True) / count + FLOOR
        a, b, c = self.factors.sigmoid()
        scale = 2 * b * spread
        return (grouped - mean - (2 * a - 1) * spread) / scale, scale, c

    def weight(self) -> Tensor:
        """[O, K] as it is now: soft, or hard with the gradient of soft."""
        x, scale, threshold = self.modulated()
        levels = soften(x, self.sharpness, threshold)
        if self.hard:
            levels = levels + (harden(x, threshold) - levels).detach()
        return (levels * scale).flatten(1)[:, : self.original.in_features]

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) if self.exact else F.linear(x, self.weight(), self.original.bias)

    @torch.no_grad()
    def finished(self) -> nn.Linear:
        """The linear it was made from, its weight ternary now."""
        x, scale, threshold = self.modulated()
        codes = harden(x, threshold).to(torch.int8).flatten(1)[:, : self.original.in_features]
        store(self.original, codes, scale[..., 0].clamp(min=FLOOR).to(torch.float16).to(scale.dtype))
        return self.original


def catq(
    model: PreTrainedModel, batches: Sequence[Tensor], settings: Catq, precision: str,
    after_window: Callable[[range, float, float], None] = lambda window, first, last: None,
) -> Cost:  # fmt: skip
    """Make the linears of the decoder layers of `model` ternary, in place.

    batches: token ids [N, T], all of one shape; their samples are reshuffled into batches of N. `after_window` hears of
    each window: its layers, the mean loss of its first and its last eighth of steps. Holds three sets of hidden states,
    fp32 or bf16 as `precision` says.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    calls, size = layer_calls(model, batches[0]), len(batches[0])
    student = torch.cat(first_layer_inputs(model, batches, precision)).cpu()
    original = student.clone()
    model.requires_grad_(False)
    layers = [layer for _, layer in decoder_layers(model)]
    mine = [_replace(layer, settings.rank, generator) for layer in layers]

    def run(window: Sequence[int], x: Tensor) -> Tensor:
        with autocast(precision, device):
            for index in window:
                x = hidden_states_of(layers[index](x, **calls[index]))
        return x

    @torch.no_grad()
    def whole(window: range, states: Tensor, exact: bool) -> Tensor:
        for index in window:
            _set(mine[index], exact=exact)
        outputs = torch.empty_like(states)
        for x, y in zip(states.split(size), outputs.split(size), strict=True):
            y.copy_(run(window, x.to(device)))
        for index in window:
            _set(mine[index], exact=False)
        return outputs

    plan = windows(len(layers))
    trained = forward = 0
    hardened: set[int] = set()
    for window, after in pairwise([*plan, range(len(layers), len(layers))]):
        targets = whole(window, original, True)
        softening = [index for index in window if settings.restart or index not in hardened]
        losses = _train(window, mine, run, student, targets, size, settings, softening, generator, device)
        hardened.update(window)
        passed = range(window.start, after.start)
        if passed:
            student, original = whole(passed, student, False), whole(passed, original, True)
        trained += settings.epochs * len(window) * student[..., 0].numel()
        forward += (len(window) + 2 * len(passed)) * student[..., 0].numel()
        part = max(1, len(losses) // 8)
        after_window(window, sum(losses[:part]) / part, sum(losses[-part:]) / part)
    for layer in layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, CatqLinear):
                layer.set_submodule(path, module.finished())
    return Cost(trained, forward)


def _train(
    window: range, mine: list[list[CatqLinear]], run: Callable[[Sequence[int], Tensor], Tensor], student: Tensor,
    targets: Tensor, size: int, settings: Catq, softening: list[int], generator: torch.Generator, device: torch.device,
) -> list[float]:  # fmt: skip
    """Train a window's layers on samples [S, T, D], `size` at a time, and leave them hard. Returns each step's loss."""
    modules = [module for index in window for module in mine[index]]
    factors = [module.factors for module in modules]
    low_rank = [p for module in modules for p in (module.down, module.up)]
    for p in (*factors, *low_rank):
        p.requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": factors, "lr": settings.rate},
        {"params": low_rank, "lr": settings.low_rank_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = settings.epochs * (len(student) // size)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses: list[Tensor] = []
    for _ in range(settings.epochs):
        for picked in torch.randperm(len(student), generator=generator)[: len(student) // size * size].split(size):
            t = (len(losses) + 1) / steps
            for index in window:
                soft = t <= settings.softened and index in softening
                _set(mine[index], sharpness=settings.sharpness * (t / settings.softened if soft else 1.0), hard=not soft)
            output = run(window, student[picked].to(device))
            loss = F.huber_loss(output.float(), targets[picked].to(device).float(), delta=settings.huber)
            loss.backward()
            nn.utils.clip_grad_norm_([*factors, *low_rank], 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
    for p in (*factors, *low_rank):
        p.requires_grad_(False)
    return torch.stack(losses).tolist()


def _replace(layer: nn.Module, rank: int, generator: torch.Generator) -> list[CatqLinear]:
    found = []
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            found.append(CatqLinear(module, rank, generator))
            layer.set_submodule(path, found[-1])
    return found


def _set(modules: list[CatqLinear], **values: Any) -> None:
    for module in modules:
        for name, value in values.items():
            setattr(module, name, value)
