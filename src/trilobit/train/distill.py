"""The losses: next-token cross-entropy, and the distance to the original model's logits.

    L = (1 − w) · CE + w · T² · KL(softmax(z_teacher/T) ‖ softmax(z_student/T))         Hinton et al., arXiv 1503.02531

Everything is averaged over tokens, in fp32. Letters: B batch, T time, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Losses:
    """`total` is what is trained; the parts are nats per token, detached."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor | None = None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per token. logits: [B, T, V], targets: [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of T² · KL(teacher ‖ student). Both [B, T, V] logits."""
    log_p = F.log_softmax(teacher.flatten(0, 1).float() / temperature, dim=-1)
    log_q = F.log_softmax(student.flatten(0, 1).float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def mixed_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, weight: float, temperature: float) -> Losses:
    """(1 − weight) · cross-entropy + weight · divergence; without a teacher, cross-entropy alone."""
    if teacher is None:
        loss = cross_entropy(logits, targets)
        return Losses(loss, loss.detach())
    distance = divergence(logits, teacher, temperature)
    if weight == 1.0:
        with torch.no_grad():
            return Losses(distance, cross_entropy(logits.detach(), targets), distance.detach())
    loss = cross_entropy(logits, targets)
    return Losses((1 - weight) * loss + weight * distance, loss.detach(), distance.detach())
