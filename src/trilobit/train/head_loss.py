"""The loss together with the head's product, so that the logits of all tokens never exist at once.

    z = h · Wᵀ, a block of tokens at a time ──▶ loss and ∂L/∂z (distill.py) ──▶ ∂h = ∂z · W, ∂W += ∂zᵀ · h

The same operations as a head followed by mixed_loss, in another order: gradients are ready when the forward ends, and nothing
is computed twice. At 8,192 tokens and 128 k entries that saves 2.1 GB of bf16 logits and as much for their gradient, and the
teacher's. On a CPU a block is many times what distill.py takes at once: each of the products reads all of W, which for a few
tokens takes longer than to multiply. The head has to be a plain linear whose output are the logits: the first batch shows
whether it is (LateHead). An embedding projection in front of it stays in the model. Of rows that FSDP2 shares out it is whole
there: what is outside the layers stays gathered from forward to backward.

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

    active: whether it is wanted at all. Call it instead of the model: the first call runs the model with its head, and looks
    whether its logits are the very tensor that a plain nn.Linear without bias gave, untouched (no soft cap, scaling, cast).
    """

    def __init__(self, model: nn.Module, active: bool = True):
        head = model.get_output_embeddings() if active else None  # pyright: ignore[reportCallIssue]
        plain = isinstance(head, nn.Linear) and type(head) in (nn.Linear, ProjectedLinear) and head.bias is None
        self.head = head if plain else None
        self.proven = False

    def __call__(self, forward: Callable[..., Any], **inputs: Any) -> tuple[Any, Tensor | None]:
        """forward's output and None, or, with hidden states [B, T, D] where the logits would be, the head's weight [V, D]."""
        head = self.head
        if head is None:
            return forward(**inputs), None
        projection = head.projection if isinstance(head, ProjectedLinear) else _same
        if self.proven:
            head.forward = lambda input: projection(input)  # pyright: ignore[reportAttributeAccessIssue]
            try:
                return forward(**inputs), head.weight
            finally:
                del head.forward
        calls: list[tuple[tuple[Tensor, ...], Tensor, int]] = []
        handle = head.register_forward_hook(lambda _, given, logits: calls.append((given, logits, logits._version)))
        try:
            output = forward(**inputs)
        finally:
            handle.remove()
        if len(calls) == 1:
            given, logits, version = calls[0]
            self.proven = len(given) == 1 and output.logits is logits and logits._version == version
        if not self.proven:
            self.head = None
            return output, None
        output.logits = projection(*calls[0][0])  # as from now on: a run that is resumed here computes what it would have
        return output, head.weight


def _same(input: Tensor) -> Tensor:
    return input


PRODUCT_ELEMENTS = {True: 1 << 25, False: BLOCK_ELEMENTS[False]}  # of logits at once; CPU: 134 MB of fp32, twice
"""CPU or not, as BLOCK_ELEMENTS, of which a block of products is cut into blocks of the loss."""


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
        on_cpu = hidden.device.type == "cpu"
        rows, few = (max(1, elements[on_cpu] // vocabulary) for elements in (PRODUCT_ELEMENTS, BLOCK_ELEMENTS))
        for start in range(0, count, rows):
            block = slice(start, start + rows)
            z = h[block] @ w.T
            theirs = None if other is None or other_w is None else other[block] @ other_w.T
            for part in (slice(i, i + few) for i in range(0, len(z), few)):
                teacher = None if theirs is None else theirs[part]
                losses, slope = block_loss(z[part], labels[block][part], teacher, weight, temperature, dtype)
                sums += losses
                z[part] = slope.div_(count)  # logits become their gradient
                del slope
            if dhidden is not None:
                dhidden[block] = z @ w
            if dhead is not None and dhead.dtype == compute:
                dhead.addmm_(z.T, h[block])
            elif dhead is not None:
                dhead += z.T @ h[block]
            del z, theirs  # before the next block's
        ctx.save_for_backward(dhidden, dhead)
        nats, distance = (sums / count).to(dtype)
        total = (1 - weight) * nats + weight * distance if other is not None else nats.clone()
        ctx.mark_non_differentiable(nats, distance)
        return total, nats, distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        dhidden, dhead = ctx.saved_tensors
        scale = gradients[0]
        if scale.device.type != "cpu" or scale.item() != 1:  # elsewhere reading it would wait for the device
            dhidden, dhead = (None if g is None else g * scale.to(g.dtype) for g in (dhidden, dhead))
        return dhidden, dhead, None, None, None, None, None, None
