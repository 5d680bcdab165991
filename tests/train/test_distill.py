import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trilobit.train import distill
from trilobit.train.distill import cross_entropy, divergence, hidden_distance, mixed_loss

B, T, V = 3, 5, 17


def random_logits(seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


TARGETS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(9))


def naive_divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T² · Σ p (log p − log q), a token at a time, in float64."""
    total = 0.0
    for z, t in zip(student.double().flatten(0, 1), teacher.double().flatten(0, 1), strict=True):
        p, q = (t / temperature).softmax(0), (z / temperature).softmax(0)
        total += float((p * (p.log() - q.log())).sum())
    return temperature**2 * total / (B * T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_pytorchs(dtype: torch.dtype) -> None:
    """It is F.cross_entropy of the flattened logits in fp32, whatever they come in."""
    logits = random_logits(0, dtype=dtype)
    found = cross_entropy(logits, TARGETS)
    assert found.dtype == torch.float32
    assert torch.equal(found, F.cross_entropy(logits.float().reshape(-1, V), TARGETS.reshape(-1)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_is_the_definition(temperature: float, dtype: torch.dtype) -> None:
    """It is T² · KL(teacher ‖ student) per token, in that direction, as a naive float64 sum gives it."""
    student, teacher = random_logits(1, dtype=dtype), random_logits(2, dtype=dtype)
    expected = naive_divergence(student, teacher, temperature)
    assert divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert abs(naive_divergence(teacher, student, temperature) - expected) > 0.01 * expected


def test_equal_logits_have_no_divergence() -> None:
    """It is zero, and so is its gradient, where the logits differ by a constant per token only."""
    teacher = random_logits(1)
    student = (teacher + torch.arange(T)[:, None]).requires_grad_()
    distance = divergence(student, teacher, 2.0)
    distance.backward()
    assert abs(distance.item()) < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_the_temperature_leaves_the_size_of_gradients() -> None:
    """T² makes the gradient T · (q_T − p_T) per token, of the same order at any T: for large T it no longer depends on T."""
    gradients = {}
    for temperature in (1.0, 30.0, 100.0):
        student = random_logits(1, 0.1).requires_grad_()
        teacher = random_logits(2, 0.1)
        divergence(student, teacher, temperature).backward()
        q, p = ((z.detach().double() / temperature).softmax(-1) for z in (student, teacher))
        assert torch.allclose(student.grad.double(), temperature * (q - p) / (B * T), rtol=1e-3, atol=2e-8 * temperature)  # pyright: ignore
        gradients[temperature] = student.grad
    assert torch.allclose(gradients[30.0], gradients[100.0], rtol=0.05, atol=1e-5)
    assert gradients[100.0].norm().item() == pytest.approx(gradients[1.0].norm().item(), rel=0.2)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_mixture_has_its_weights(weight: float) -> None:
    """Value and gradient are (1 − w) · CE + w · KL, and the parts are reported apart and detached."""
    student, teacher = random_logits(1).requires_grad_(), random_logits(2)
    losses = mixed_loss(student, TARGETS, teacher, weight, 2.0)
    expected = (1 - weight) * cross_entropy(student, TARGETS) + weight * divergence(student, teacher, 2.0)
    assert torch.allclose(losses.total, expected)
    found_grad, expected_grad = (torch.autograd.grad(loss, student)[0] for loss in (losses.total, expected))
    assert torch.allclose(found_grad, expected_grad, atol=1e-7)
    assert losses.divergence is not None
    assert losses.cross_entropy.item() == pytest.approx(cross_entropy(student, TARGETS).item())
    assert losses.divergence.item() == pytest.approx(divergence(student, teacher, 2.0).item())
    assert not losses.cross_entropy.requires_grad
    assert not losses.divergence.requires_grad


def test_without_a_teacher_it_is_cross_entropy() -> None:
    """No teacher, no divergence, whatever the weight says."""
    losses = mixed_loss(random_logits(1).requires_grad_(), TARGETS, None, 1.0, 3.0)
    assert torch.equal(losses.total, losses.cross_entropy)
    assert losses.total.requires_grad
    assert losses.divergence is None


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_one_pass_equals_the_composed_losses(weight: float | None, dtype: torch.dtype, bound: float) -> None:
    """Value and gradient equal autograd through the composed losses in float64, whatever the block, for odd sizes.

    bf16's bound is one rounding of the gradient to bf16 (2⁻⁸), fp32's eight of fp32.
    """
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 7, 1031, generator=generator).mul(4).to(dtype) for _ in range(2))
    targets = torch.randint(0, 1031, (2, 7), generator=generator)
    for block in (1, 3 * 1031, 1 << 20):
        exact = student.double().clone().requires_grad_()
        flat = exact.flatten(0, 1)
        p, q = (teacher.double().flatten(0, 1) / 2.5).log_softmax(-1), (flat / 2.5).log_softmax(-1)
        nats = F.nll_loss(flat.log_softmax(-1), targets.flatten())
        distance = (p.exp() * (p - q)).sum() / 14 * 2.5**2
        expected = nats if weight is None else (1 - weight) * nats + weight * distance
        (expected / 3).backward()
        found = student.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(distill.BLOCK_ELEMENTS, True, block)
            losses = mixed_loss(found, targets, None if weight is None else teacher, weight or 0.0, 2.5)
        (losses.total / 3).backward()
        assert losses.total.item() == pytest.approx(
            expected.item(), rel=max(bound / 10, 1e-6) if dtype != torch.float64 else bound
        )
        assert found.grad is not None
        assert exact.grad is not None
        assert found.grad.dtype == dtype
        assert (found.grad.double() - exact.grad).norm() <= bound * exact.grad.norm()


def test_the_gradient_survives_a_second_backward() -> None:
    """Going backward twice through a retained graph gives the same gradient twice: nothing is scaled in place."""
    logits = random_logits(1).requires_grad_()
    loss = mixed_loss(logits, TARGETS, None, 0.0, 1.0).total * 5
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    once = torch.autograd.grad(mixed_loss(logits, TARGETS, None, 0.0, 1.0).total, logits)[0]
    assert torch.allclose(first, once * 5)


def test_not_finite_logits_give_a_loss_that_is_not_finite() -> None:
    """NaN and infinity reach the loss, where the loop can see them."""
    for bad in (float("nan"), float("inf")):
        logits = random_logits(1)
        logits[1, 2, 3] = bad
        assert not torch.isfinite(mixed_loss(logits, TARGETS, None, 0.0, 1.0).total)


def test_hidden_states_are_compared_token_by_token() -> None:
    """Mean over layers and tokens of the squared distance over the teacher's squared length, however long a token is."""
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(B, T, 7, generator=generator) for _ in range(3)]
    student = [state + 0.1 * torch.randn(B, T, 7, generator=generator) for state in teacher]
    pairs = [
        (s, t) for a, b in zip(student, teacher, strict=True) for s, t in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)
    ]
    expected = sum(float((s - t).square().sum() / t.square().sum()) for s, t in pairs) / len(pairs)
    assert hidden_distance(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    loud = torch.ones(B, T, 1)
    loud[0, 0] = 1000.0
    scaled = hidden_distance([s * loud for s in student], [t * loud for t in teacher])
    assert scaled.item() == pytest.approx(expected, rel=1e-5)
    assert hidden_distance(teacher, teacher).item() == 0
    assert hidden_distance([torch.ones(1, 1, 4)], [torch.zeros(1, 1, 4)]).isfinite()
