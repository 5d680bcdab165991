"""The losses: next-token cross-entropy, and the distance to the original model's logits.

    L = (1 − w) · CE + w · T² · KL(softmax(z_teacher/T) ‖ softmax(z_student/T))         Hinton et al., arXiv 1503.02531

Everything is averaged over tokens, in fp32. With a large vocabulary the loss is a fifth of a small model's step when it
is composed (each of log-softmax, gather, their backwards and the casts between is a pass over tokens × V numbers in fp32).
`mixed_loss` goes once over the logits, a block of rows that fits the cache at a time, and leaves the gradient with
respect to the logits, in their own dtype, which is all the backward needs:

    ∂L/∂z = (1 − w) · (softmax(z) − onehot) + w · T · (softmax(z/T) − softmax(z_teacher/T))        over the token count

Letters: B batch, T time, V vocabulary, N = B · T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Losses:
    """`total` is what is trained; the parts are nats per token, detached."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor | None = None
    relations: Tensor | None = None
    hidden: Tensor | None = None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per token. logits: [B, T, V], targets: [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of T² · KL(teacher ‖ student). Both [B, T, V] logits."""
    log_p = F.log_softmax(teacher.flatten(0, 1).float() / temperature, dim=-1)
    log_q = F.log_softmax(student.flatten(0, 1).float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of ‖h_student − h_teacher‖² / ‖h_teacher‖², in fp32. Each a list of [B, T, D].

    Relative to each token: a few have activations a thousand times the others' and would be all there is.
    """
    parts = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.float()
        scale = theirs.square().sum(-1).clamp(min=1e-12)
        parts.append(((ours.float() - theirs).square().sum(-1) / scale).mean())
    return torch.stack(parts).mean()


def mixed_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, weight: float, temperature: float) -> Losses:
    """(1 − weight) · cross-entropy + weight · divergence; without a teacher, cross-entropy alone.

    logits, teacher: [B, T, V]; targets: [B, T]. The same numbers as composing `cross_entropy` and `divergence`.
    """
    weight = 0.0 if teacher is None else weight
    total, nats, distance = _MixedLoss.apply(logits, targets, teacher, weight, temperature)
    return Losses(total, nats, None if teacher is None else distance)


class _MixedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, teacher: Tensor | None, weight: float, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, labels = logits.flatten(0, -2), targets.flatten()
        count, width = z.shape
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        gradient = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(2, dtype=torch.float64, device=z.device)
        rows = max(1, BLOCK_ELEMENTS[z.device.type == "cpu"] // width)
        for start in range(0, count, rows):
            block = slice(start, start + rows)
            other = None if teacher is None else teacher.flatten(0, -2)[block]
            losses, slope = block_loss(z[block], labels[block], other, weight, temperature, dtype)
            sums += losses
            if gradient is not None:
                gradient[block] = slope.div_(count)
        ctx.save_for_backward(gradient)
        ctx.shape = logits.shape
        nats, distance = (sums / count).to(dtype)
        total = (1 - weight) * nats + weight * distance if teacher is not None else nats.clone()
        ctx.mark_non_differentiable(nats, distance)
        return total, nats, distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        scale = gradients[0]
        if scale.device.type != "cpu" or scale.item() != 1:  # elsewhere reading it would wait for the device
            gradient = gradient * scale.to(gradient.dtype)
        return gradient.view(ctx.shape), None, None, None, None


BLOCK_ELEMENTS = {True: 1 << 20, False: 1 << 27}  # CPU: 4 MB of fp32, in cache; elsewhere: few launches


def block_loss(
    z: Tensor, labels: Tensor, teacher: Tensor | None, weight: float, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of a block of rows [R, V], computed in `dtype`: the sums over its rows of nats and of divergence, [2], and the gradient
    with respect to z of (1 − weight) · nats + weight · divergence, not averaged; without a teacher of nats alone."""
    nats, slope = _cross_entropy_block(z.to(dtype, copy=True), labels)
    if teacher is None:
        return torch.stack([nats, torch.zeros_like(nats)]), slope
    distance, other_slope = _divergence_block(z.to(dtype, copy=True), teacher.to(dtype), temperature)
    return torch.stack([nats, distance]), slope.mul_(1 - weight).add_(other_slope, alpha=weight)


def _cross_entropy_block(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of nats of a block of rows, and softmax(z) − onehot. `z` is overwritten."""
    labels = labels.unsqueeze(1)
    largest = z.amax(dim=-1, keepdim=True)
    picked = z.gather(1, labels)
    exponentials = z.sub_(largest).exp_()
    norm = exponentials.sum(dim=-1, keepdim=True)
    nats = (norm.log() + largest - picked).sum()
    slope = exponentials.div_(norm)
    slope.scatter_add_(1, labels, torch.full_like(picked, -1.0))
    return nats, slope


def _divergence_block(z: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum of T² · KL(teacher ‖ student) of a block of rows, and T · (softmax(z/T) − softmax(teacher/T))."""
    log_q = F.log_softmax(z.div_(temperature), dim=-1)
    log_p = F.log_softmax(teacher.div(temperature), dim=-1)
    p = log_p.exp()
    distance = (p * (log_p - log_q)).sum() * temperature**2
    return distance, log_q.exp_().sub_(p).mul_(temperature)
