"""The loss that applies the head itself: mixed_loss's numbers, gradients and all, without the logits of all tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import families
from trilobit.surgery.outlier_safe import outlier_safe
from trilobit.train import head_loss as module
from trilobit.train.distill import mixed_loss
from trilobit.train.head_loss import LateHead, head_loss
from trilobit.train.objective import NextToken

B, T, D, V = 3, 7, 10, 33
TARGETS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(9))


def both(
    dtype: torch.dtype, distilled: bool, rows: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of head_loss in products of `rows` and losses of `few`, and of the head followed by mixed_loss."""
    monkeypatch.setattr(module, "PRODUCT_ELEMENTS", {True: rows * V})
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", {True: few * V})
    torch.manual_seed(3)
    shapes = (B, T, D), (V, D), (B, T, D + 2), (V, D + 2)
    hidden, head, other, other_head = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    late = head_loss(hidden, head, TARGETS, (other, other_head) if distilled else None, 0.3, 2.0)
    early = mixed_loss(F.linear(hidden, head), TARGETS, F.linear(other, other_head) if distilled else None, 0.3, 2.0)
    results = []
    for losses in (late, early):
        parts = [losses.total.detach(), losses.cross_entropy, *([losses.divergence] if distilled else [])]
        assert all(part is not None for part in parts)
        results.append([*parts, *torch.autograd.grad(3 * losses.total, (hidden, head))])
    return results[0], results[1]


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize(("rows", "few"), [(1, 1), (4, 4), (8, 3), (4, 1000), (1000, 5), (1000, 1000)])
def test_it_is_the_head_followed_by_the_loss(rows: int, few: int, distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 to 1e-12, in blocks that divide the tokens or do not; also where only one operand wants a gradient."""
    for ours, theirs in zip(*both(torch.float64, distilled, rows, few, monkeypatch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for wanted in range(2):
        operands = [torch.randn(B, T, D), torch.randn(V, D)]
        operands[wanted].requires_grad_()
        head_loss(*operands, TARGETS, None, 0.0, 1.0).total.backward()
        assert [operand.grad is not None for operand in operands] == [wanted == 0, wanted == 1]


def test_under_autocast_it_is_as_near_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 products its losses and gradients lie within 1.5 × the distance of the head and mixed_loss from float64."""
    exact, _ = both(torch.float64, True, 4, 3, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        found = both(torch.float32, True, 4, 3, monkeypatch)
    for ours, theirs, truth in zip(*found, exact, strict=True):
        error, baseline = ((found.double() - truth).norm().item() for found in (ours, theirs))
        assert error <= 1.5 * baseline + 2e-3 * truth.norm().item()


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of as many elements as the logits is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))])
            return out

    monkeypatch.setattr(module, "PRODUCT_ELEMENTS", {True: 4 * 500})
    hidden, head = torch.randn(1, 400, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with Watch():
        head_loss(hidden, head, torch.zeros(1, 400, dtype=torch.int64), None, 0.0, 1.0).total.backward()
    assert largest == 500 * 8


def test_a_model_trains_alike_with_its_head_in_the_loss() -> None:
    """The head is applied late, from the first batch on with the same bits; losses and gradients of all parameters stay those
    of the model as it is, with tied embeddings too, and with an embedding projection in front of the head; the model is left
    as it was."""
    for tied, projected in ((True, False), (False, False), (False, True)):
        model = families.build("llama", tied=tied).double()
        if projected:
            outlier_safe(model, ssnorm=False, embproj=True)
        windows = torch.randint(0, model.config.vocab_size, (2, 6))
        late = LateHead(model)
        found = []
        for objective in (NextToken(model), NextToken(model, late), NextToken(model, late)):
            model.zero_grad()
            loss = objective(windows).total
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert late.proven
        for ours, theirs in zip(found[2], found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert all(torch.equal(first, later) for first, later in zip(found[1], found[2], strict=True))
        assert "forward" not in vars(model.get_output_embeddings())
        assert model(input_ids=windows).logits.shape[-1] == model.config.vocab_size


def test_a_head_that_something_follows_is_left_alone() -> None:
    """Logits that are scaled after the head, in place or not, a head with a bias, or of another class, are computed by the
    model."""

    class Scaled(nn.Module):
        def __init__(self, head: nn.Module):
            super().__init__()
            self.head = head

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, x: Tensor, factor: float) -> Any:
            return type("Output", (), {"logits": self.head(x) * factor})

    class ScaledInPlace(Scaled):
        def forward(self, x: Tensor, factor: float) -> Any:
            return type("Output", (), {"logits": self.head(x).mul_(factor)})

    x = torch.randn(2, 3, 5)
    plain = nn.Linear(5, 9, bias=False)
    models = [ScaledInPlace(plain), *(Scaled(head) for head in (plain, nn.Linear(5, 9), nn.Sequential(plain)))]
    for model in models:
        head = model.head
        late = LateHead(model)
        for _ in range(2):
            output, weight = late(model, x=x, factor=2.0)
            assert weight is None
            assert torch.equal(output.logits, head(x) * 2)
