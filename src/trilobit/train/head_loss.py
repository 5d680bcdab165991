"""The loss together with the head's product, so that the logits of all tokens never exist at once.

    z = h · Wᵀ, a block of tokens at a time ──▶ loss and ∂L/∂z (distill.py) ──▶ ∂h = ∂z · W, ∂W += ∂zᵀ · h

The same operations as a head followed by mixed_loss, in another order: gradients are ready when the forward ends, and nothing
is computed twice. At 8,192 tokens and 128 k entries that saves 2.1 GB of bf16 logits and as much for their gradient, and the
teacher's. The head has to be a plain linear whose output are the logits: the first batch shows whether it is (LateHead). An
embedding projection in front of it stays in the model. Of rows that FSDP2 shares out it is whole there: what is outside the
layers stays gathered from forward to backward.

Letters: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trilobit.nn.outlier_safe import ProjectedLinear
from trilobit.train.distill import BLOCK_ELEMENTS, Losses, block_loss


class LateHead:
    """A model's head, left out of its forward and applied by head_loss, where that is the same.

    active: whether it is wanted at all. Call it instead of the model: the first call runs the model as it is, and looks whether
    its logits are the very tensor that a plain nn.Linear without bias gave (no soft cap, no scaling, no cast).
    """

    def __init__(self, model: nn.Module, active: bool):
        head = model.get_output_embeddings() if active else None  # pyright: ignore[reportCallIssue]
        plain = isinstance(head, nn.Linear) and type(head) in (nn.Linear, ProjectedLinear) and head.bias is None
        self.head = head if plain else None
        self.proven = False

    def __call__(self, forward: Callable[..., Any], **inputs: Any) -> tuple[Any, Tensor | None]:
        """forward's output and None, or, with hidden states [B, T, D] where the logits would be, the head's weight [V, D]."""
        head = self.head
        if head is None:
            return forward(**inputs), None
        if not self.proven:
            given: list[Tensor] = []
            handle = head.register_forward_hook(lambda *seen: given.append(seen[2]))
            try:
                output = forward(**inputs)
            finally:
                handle.remove()
            self.proven = len(given) == 1 and given[0] is output.logits
            self.head = head if self.proven else None
            return output, None
        projection = head.projection if isinstance(head, ProjectedLinear) else _same
        head.forward = lambda input: projection(input)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return forward(**inputs), head.weight
        finally:
            del head.forward


def _same(input: Tensor) -> Tensor:
    return input


def head_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, teacher: tuple[Tensor, Tensor] | None, weight: float, temperature: float
) -> Losses:
    """mixed_loss of hidden · headᵀ, and of the teacher's, without materialising either.

    hidden: [B, T, D]; head: [V, D]; targets: [B, T]; teacher: its hidden states [B, T, D'] and head [V, D'], or None. Products
    are in the autocast dtype if autocast is on.
    """
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    weight = 0.0 if teacher is None else weight
    with torch.autocast(kind, enabled=False):
        total, nats, distance = _HeadLoss.apply(
            hidden.flatten(0, -2), head, targets.flatten(), *(teacher or (None, None)), weight, temperature, compute
        )
    return Losses(total, nats, None if teacher is None else distance)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, other: Tensor | None, other_head: Tensor | None,
        weight: float, temperature: float, compute: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        count, vocabulary = hidden.shape[0], head.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        h, w = hidden.to(compute), head.to(compute)
        other = None if other is None else other.flatten(0, -2).to(compute)
        other_w = None if other_head is None else other_head.to(compute)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        rows = max(1, BLOCK_ELEMENTS[hidden.device.type == "cpu"] // vocabulary)
        for start in range(0, count, rows):
            block = slice(start, start + rows)
            z = h[block] @ w.T
            theirs = None if other is None or other_w is None else other[block] @ other_w.T
            losses, slope = block_loss(z, labels[block], theirs, weight, temperature, dtype)
            sums += losses
            slope = slope.div_(count).to(compute)
            if dhidden is not None:
                dhidden[block] = slope @ w
            if dhead is not None:
                dhead += slope.T @ h[block]
        ctx.save_for_backward(dhidden, dhead)
        nats, distance = (sums / count).to(dtype)
        total = (1 - weight) * nats + weight * distance if other is not None else nats.clone()
        ctx.mark_non_differentiable(nats, distance)
        return total, nats, distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        dhidden, dhead = (None if g is None else g * gradients[0].to(g.dtype) for g in ctx.saved_tensors)
        return dhidden, dhead, None, None, None, None, None, None
