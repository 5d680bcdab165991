"""SpinQuant (arXiv 2405.16406): learn the rotation of the residual stream from the loss of the quantised model.

    L(R) = cross-entropy of the model in which everything that decoder linears read is quantised, norm outputs as Q(x̂ R) Rᵀ
    A = ∂L/∂R · Rᵀ,   S = (A − Aᵀ)/2                                        the gradient along the orthogonal matrices
    R ← (I + α/2 S)⁻¹ (I − α/2 S) R,   α = min(lr, 1/‖S‖₁)                  a Cayley step down it (arXiv 2002.01113)

Weights are frozen, and not copied: as RMSNorm commutes with R, hooks turn what a norm gives (x̂, without its gain g), quantise
it, turn it back and give it its gain; the linears stay as they are. Only `quantise_weights` needs the turned weights
Q(W diag(g) R), which live as long as one backward pass. The step solves its D×D system in float64 instead of iterating to
it, so R stays orthogonal to rounding. Rounding passes gradients straight through, and errors are as large as the range of
what is rounded: that gradient says what a turn does to the *size* of the errors and not only to their direction.

The budget of the authors' published script: 100 steps, each on 8 windows of 2,048 tokens of WikiText-2's training split
(1.6 M tokens), lr 1.5 decayed to zero along a cosine, no momentum, five fixed-point iterations for the step, one rotation of
the values per layer learned as well, keys and values quantised and the attention's output by head, weights quantised only if
they are later rounded to nearest, ranges without a gradient. The paper's own numbers come from a code base that is not
public: its order of windows and its seed cannot be known. Here: R of the residual stream alone; the rest as there, by the
knobs of the protocol.

Letters: D width, N windows, T tokens of a window.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trilobit import quant
from trilobit.errors import DataError, NonFiniteError
from trilobit.fourbit.attention import CacheQuantizer, changed_attention
from trilobit.fourbit.quarot import matrix, random_rotation
from trilobit.listener import SILENT, Listener
from trilobit.surgery.roles import evaluating
from trilobit.surgery.rotate import Rotation
from trilobit.surgery.stream import Stream, find_stream

Quantise = Callable[[Tensor], Tensor]
"""A tensor → the same, fake-quantised along its last dimension."""

WORSENED = "; LEARNING MADE ITS LOSS WORSE: compare with --rotate quarot, which begins where it began"
PATIENCE = 10  # steps in a row that are not finite
TOKENS = 2048  # that a graph is kept for at once: windows shorter than that run together


@dataclass(frozen=True)
class LearnedRotation:
    """R [D, D] float64 on the CPU, and what it cost. losses: of each step, before it; `skipped` of them were not finite. after:
    what the sequences of the first step lose at the end."""

    matrix: Tensor
    losses: tuple[float, ...]
    steps: int
    tokens: int
    lr: float
    seed: int
    skipped: int
    after: float = math.nan  # not known of one that was kept by an earlier version

    @property
    def worsened(self) -> bool:
        """Whether the sequences of the first step lose more at the end than they did then."""
        return self.after > self.losses[0]

    @property
    def rotation(self) -> Rotation:
        """For `rotate`, with the budget in its description."""
        budget = f"{self.steps} steps, {self.tokens:,} tokens, lr {self.lr:g}, seed {self.seed}"
        budget += f", loss of the first batch {self.losses[0]:.4f} to {self.after:.4f}, {self.skipped} skipped"
        if self.worsened:
            budget += WORSENED
        return Rotation(len(self.matrix), lambda x: x @ self.matrix.to(x), f"a rotation learned by Cayley steps ({budget})")


def learn(
    model: PreTrainedModel, windows: Tensor, *, quantise_activations: Quantise, quantise_outputs: Quantise | None = None,
    quantise_weights: Quantise | None = None, cache: CacheQuantizer | None = None, steps: int = 100, batch: int = 8,
    lr: float = 1.5, seed: int = 0, through_ranges: bool = False, listener: Listener = SILENT,
) -> LearnedRotation:  # fmt: skip
    """Learn a rotation of the residual stream on windows [N, T] of token ids; `model` is left as it was.

    quantise_activations: of what decoder linears read; quantise_outputs: of what the attention's last ones read, if another;
    quantise_weights: of their turned weights [O, K], by row; cache: of keys and values. What turns
    values (rotate, with R = I) or runs online belongs to the quantised model: attach it first. Starts from quarot's
    randomised Hadamard matrix of the same seed. A step takes `batch` windows, in an order drawn from the seed; lr
    falls to zero along a cosine. through_ranges: see straight_through. A step whose loss or gradient is not finite is
    skipped. Raises NonFiniteError after ten of these in a row, DataError for windows too short, ModelError for what
    `rotate` refuses.
    """
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise DataError(
            f"windows of shape {tuple(windows.shape)} are none to learn a rotation from: it takes [N, T] with T ≥ 2."
        )
    stream = find_stream(model)
    rotation = matrix(random_rotation(stream.width, seed)).to(model.device)
    how = _How(quantise_activations, quantise_outputs or quantise_activations, quantise_weights, cache, through_ranges)
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
    losses: list[float] = []
    tokens = skipped = in_a_row = 0
    for step in range(steps):
        picked = windows[order[step * batch : (step + 1) * batch]]
        loss, gradient = _loss_and_gradient(model, stream, rotation, picked, how)
        losses.append(loss)
        tokens += picked.numel()
        if math.isfinite(loss) and gradient.isfinite().all():
            in_a_row = 0
            rotation = cayley_step(rotation, gradient, lr * 0.5 * (1 + math.cos(math.pi * step / steps)))
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        if in_a_row == PATIENCE:
            raise NonFiniteError(
                f"the loss of the quantised model was not finite {PATIENCE} steps in a row, up to step {step + 1}: run the "
                "model in fp32, or use `--rotate quarot`, which learns nothing."
            )
        listener.row({"step": step + 1, "tokens": tokens, "loss": loss}, steps * batch * windows.shape[1])
    with torch.no_grad():
        after = sum(loss.item() for loss in _losses(model, stream, rotation, windows[order[:batch]], how))
    return LearnedRotation(rotation.cpu(), tuple(losses), steps, tokens, lr, seed, skipped, after)


def cayley_step(rotation: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """R [D, D] moved down `gradient` [D, D] along the orthogonal matrices, by at most 1/‖S‖₁ times S; float64."""
    product = gradient.to(rotation) @ rotation.T
    skew = (product - product.T) / 2
    half = 0.5 * min(lr, 1 / max(torch.linalg.matrix_norm(skew, 1).item(), 1e-30))
    identity = torch.eye(len(rotation)).to(rotation)
    return torch.linalg.solve(identity + half * skew, (identity - half * skew) @ rotation)


def quantised_loss(
    model: PreTrainedModel, windows: Tensor, rotation: Tensor | None, quantise_activations: Quantise,
    quantise_weights: Quantise | None = None, quantise_outputs: Quantise | None = None, cache: CacheQuantizer | None = None,
) -> float:  # fmt: skip
    """Mean cross-entropy over windows [N, T] of the model that `learn` sees, at R [D, D]; None: not turned."""
    stream = find_stream(model)
    turned = torch.eye(stream.width, dtype=torch.float64) if rotation is None else rotation
    how = _How(quantise_activations, quantise_outputs or quantise_activations, quantise_weights, cache, through_ranges=False)
    with torch.no_grad():
        return sum(loss.item() for loss in _losses(model, stream, turned.to(model.device), windows, how))


@dataclass(frozen=True)
class _How:
    activations: Quantise
    outputs: Quantise
    weights: Quantise | None
    cache: CacheQuantizer | None
    through_ranges: bool

    def through(self, quantise: Quantise) -> Quantise:
        """`quantise` with a gradient."""
        return partial(straight_through, quantise=quantise, through_ranges=self.through_ranges)

    def changing(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Within, keys and values are quantised."""
        if self.cache is None:
            return nullcontext()
        keys, values = (None if x is None else self.through(x) for x in (self.cache.keys, self.cache.values))
        return changed_attention(model, CacheQuantizer(keys, values, self.cache.turn))


def _loss_and_gradient(
    model: PreTrainedModel, stream: Stream, rotation: Tensor, windows: Tensor, how: _How
) -> tuple[float, Tensor]:
    """Mean loss over the windows, and ∂loss/∂R."""
    turned = rotation.clone().requires_grad_()
    gradient, total = torch.zeros_like(rotation), 0.0
    with torch.enable_grad():
        for loss in _losses(model, stream, turned, windows, how):
            gradient += torch.autograd.grad(loss, turned)[0]
            total += loss.item()
    return total, gradient


def _losses(model: PreTrainedModel, stream: Stream, rotation: Tensor, windows: Tensor, how: _How) -> Iterator[Tensor]:
    """Parts of the mean loss of the quantised, turned model: of some windows at a time. `model` is put back at the end."""
    wanted = torch.is_grad_enabled()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for piece in windows.to(model.device).split(max(1, TOKENS // windows.shape[1])):
            with evaluating(model), torch.set_grad_enabled(wanted), _quantised(model, stream, rotation, how) as new:
                output: Any = torch.func.functional_call(model, new, (), {"input_ids": piece, "use_cache": False})
                loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), piece[:, 1:].flatten())
            yield loss * (len(piece) / len(windows))
    finally:
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def _quantised(model: PreTrainedModel, stream: Stream, rotation: Tensor, how: _How) -> Iterator[dict[str, Tensor]]:
    """Hooks that make `model` compute as if turned and quantised; yields the parameters that replace its own."""
    decoder = {path: norm for path, norm in stream.readers.items() if path != stream.roles.head}
    roles = {site.path: site.role for site in stream.roles.sites}
    activations, outputs = how.through(how.activations), how.through(how.outputs)
    weights = how.weights and how.through(how.weights)

    def gain_of(norm: str) -> Tensor:
        rule = stream.norms[norm]
        return rule.offset + model.get_submodule(norm).get_parameter(rule.parameter)

    def after_norm(norm: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gain = gain_of(norm)
        plain = quant.rms_norm(inputs[0], torch.ones_like(gain), stream.norms[norm].eps)
        turned = activations(plain @ rotation.to(plain))
        return turned if weights is not None else turned @ rotation.T.to(plain) * gain

    def before_writer(quantise: Quantise, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return quantise(inputs[0]), *inputs[1:]

    def after_writer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output @ rotation.T.to(output)

    new: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(how.changing(model))
        for norm in dict.fromkeys(decoder.values()):
            stack.callback(model.get_submodule(norm).register_forward_hook(partial(after_norm, norm)).remove)
        for path in stream.writers:
            hook = partial(before_writer, outputs if roles[path] == "attention-output" else activations)
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
        if weights is not None:
            for path, norm in decoder.items():
                weight = model.get_parameter(f"{path}.weight")
                new[f"{path}.weight"] = weights(weight * gain_of(norm) @ rotation.to(weight))
            for path in stream.writers:
                linear: Any = model.get_submodule(path)
                new[f"{path}.weight"] = weights(rotation.T.to(linear.weight) @ linear.weight)
                if linear.bias is not None:
                    new[f"{path}.bias"] = linear.bias @ rotation.to(linear.bias)
                stack.callback(linear.register_forward_hook(after_writer).remove)
        yield new


def straight_through(x: Tensor, quantise: Quantise, through_ranges: bool = False) -> Tensor:
    """quantise(x), with the gradient of x (Bengio et al., arXiv 1308.3432) and, with through_ranges, that of the errors' size.

    The codes taken as fixed, an error is a fixed multiple of the scale, and the scale one of the range of its row, max − min:
    ∂ of the error is error/range · ∂range, whatever the quantiser, as long as Q(c·x) = c·Q(x).
    """
    error = quantise(x.detach()) - x.detach()
    if through_ranges:
        reach = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).clamp(min=torch.finfo(x.dtype).tiny)
        error = error * (reach / reach.detach())
    return x + error
