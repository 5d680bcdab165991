"""The outlier-safe modules: what they compute, what they leave to others, and how two norms are one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trilobit import quant
from trilobit.nn.outlier_safe import (
    EmbeddingProjection,
    ProjectedEmbedding,
    ProjectedLinear,
    SingleScaleRMSNorm,
    random_orthogonal,
)
from trilobit.nn.ternary import TernaryLinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_single_scale_norm_is_its_equation(dtype: torch.dtype, scale: float) -> None:
    """y = s·x/√(mean x² + eps) over the last dimension, in x's dtype, rounded once from fp32 (float64 for float64)."""
    norm = SingleScaleRMSNorm(1e-3)
    assert norm.weight.tolist() == [1.0]
    with torch.no_grad():
        norm.weight.fill_(scale)
        x = torch.randn(2, 3, 17).to(dtype) * 0.05
        got = norm(x)
    s = norm.weight.double()
    expected = s * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    assert got.dtype == dtype
    error = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 4)
    assert ((got.double() - expected).abs() <= error * expected.abs()).all()


def test_single_scale_gradient_is_the_sum_of_a_repeated_gain() -> None:
    """The scale's gradient is the sum over channels of the gradient that a gain vector of the same value gets."""
    norm, gain = SingleScaleRMSNorm(1e-6).double(), torch.ones(9, dtype=torch.float64, requires_grad=True)
    x, upstream = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    (norm(x) * upstream).sum().backward()
    (quant.rms_norm(x, gain, 1e-6) * upstream).sum().backward()
    assert norm.weight.grad is not None and gain.grad is not None
    assert torch.allclose(norm.weight.grad, gain.grad.sum(), rtol=1e-12)


def test_projection_starts_orthogonal() -> None:
    """P Pᵀ is the identity to fp32 rounding, the same for the same seed, other for another, and y = x Pᵀ."""
    projection = EmbeddingProjection(24)
    assert torch.allclose(projection.weight @ projection.weight.T, torch.eye(24), atol=1e-6)
    x = torch.randn(3, 24)
    assert torch.equal(projection(x), x @ projection.weight.T)
    first, same, other = (random_orthogonal(24, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert torch.allclose(first @ first.T, torch.eye(24, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_projected_embedding(scale: float) -> None:
    """It is projection(scale · E[ids]), is an nn.Embedding, and folds to the rows of one without a projection."""
    embedding = ProjectedEmbedding(11, 6, padding_idx=2, scale=scale)
    nn.init.normal_(embedding.projection.weight)
    ids = torch.tensor([[3, 2, 10], [0, 3, 1]])
    assert isinstance(embedding, nn.Embedding)
    assert torch.equal(embedding(ids), embedding.projection(F.embedding(ids, embedding.weight) * scale))
    folded = embedding.folded()
    assert folded.dtype == torch.float64
    assert torch.allclose(F.embedding(ids, folded) * scale, embedding(ids).double(), rtol=1e-5, atol=1e-6)
    embedding(ids).sum().backward()
    assert embedding.weight.grad is not None
    assert not embedding(torch.tensor([2])).any()
    assert not embedding.weight.grad[2].any()
    assert embedding.weight.grad[3].all()


@pytest.mark.parametrize("bias", [True, False])
def test_projected_linear(bias: bool) -> None:
    """It is linear(projection(x)), is an nn.Linear, and folds to the weight of one without a projection."""
    linear = ProjectedLinear(6, 11, bias)
    nn.init.normal_(linear.projection.weight)
    x = torch.randn(2, 3, 6)
    assert isinstance(linear, nn.Linear)
    assert torch.equal(linear(x), F.linear(linear.projection(x), linear.weight, linear.bias))
    folded = F.linear(x.double(), linear.folded(), None if linear.bias is None else linear.bias.double())
    assert torch.allclose(folded, linear(x).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_putting_a_projection_in_keeps_the_function(dtype: torch.dtype) -> None:
    """A projected embedding or head made from a plain one gives its outputs, and leaves the plain one's weights alone."""
    embedding, head = nn.Embedding(11, 6, padding_idx=2).to(dtype), nn.Linear(6, 11).to(dtype).eval()
    before = copy.deepcopy((embedding, head))
    rotation, ids, x = random_orthogonal(6), torch.arange(11), torch.randn(3, 6, dtype=dtype)
    projected, projected_head = (
        ProjectedEmbedding.from_embedding(embedding, rotation),
        ProjectedLinear.from_linear(head, rotation),
    )
    error = 8 * torch.finfo(dtype).eps
    assert (projected(ids) - embedding(ids)).abs().max() <= error * embedding.weight.abs().max()
    assert (projected_head(x) - head(x)).abs().max() <= error * head(x).abs().max()
    assert (projected.padding_idx, projected.training, projected_head.training) == (2, True, False)
    assert all(p.dtype == dtype and not p.is_meta for m in (projected, projected_head) for p in m.parameters())
    assert torch.equal(embedding.weight, before[0].weight)
    assert torch.equal(head.weight, before[1].weight)


def test_autocast_leaves_the_residual_stream_in_fp32() -> None:
    """Under bf16 autocast an fp32 projected embedding gives fp32, as a plain one does, and the norm keeps its input's dtype."""
    embedding, norm = ProjectedEmbedding(11, 6), SingleScaleRMSNorm(1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(torch.arange(11)).dtype == nn.Embedding(11, 6)(torch.arange(11)).dtype == torch.float32
        for dtype in (torch.float32, torch.bfloat16):
            assert norm(torch.randn(2, 6, dtype=dtype)).dtype == dtype


def test_modules_can_be_built_on_meta() -> None:
    """Every module can be built without memory and its parameters have the names that a checkpoint will have."""
    with torch.device("meta"):
        modules = (SingleScaleRMSNorm(1e-6), EmbeddingProjection(6), ProjectedEmbedding(11, 6), ProjectedLinear(6, 11))
    names = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in modules]
    assert all(p.is_meta for module in modules for p in module.parameters())
    carried = {"weight": (11, 6), "projection.weight": (6, 6)}
    assert names == [{"weight": (1,)}, {"weight": (6, 6)}, carried, carried]


# Where the papers meet: a norm with a scalar gain g in front of a ternary linear, after a single-scale block norm.

SCALES = st.floats(0.05, 20).flatmap(lambda x: st.sampled_from([x, -x]))
EPS = st.sampled_from([1e-8, 1e-6, 1e-5, 1e-2])


def single(scale: float, eps: float) -> SingleScaleRMSNorm:
    norm = SingleScaleRMSNorm(eps, dtype=torch.float64)
    nn.init.constant_(norm.weight, scale)
    return norm


@given(s=SCALES, g=SCALES, first=EPS, second=EPS, size=st.floats(1e-3, 1e3))
def test_two_norms_are_one(s: float, g: float, first: float, second: float, size: float) -> None:
    """Scale g after scale s is one norm of scale g·s/√(s² + ε₂) and eps ε₁ε₂/(s² + ε₂), to 1e-13 in float64."""
    x = torch.randn(5, 12, dtype=torch.float64) * size
    root = (s * s + second) ** 0.5
    with torch.no_grad():
        both = single(g, second)(single(s, first)(x))
        one = single(g * s / root, first * second / root**2)(x)
        assert ((both - one).abs() <= 1e-13 * one.abs()).all()
        # Without eps it is sign(s)·g·x/rms(x); eps takes away at most this fraction of that.
        mean = x.pow(2).mean(-1, keepdim=True)
        ideal = g * (1 if s > 0 else -1) * x / mean.sqrt()
        bound = (second / s**2 * (1 + first / mean)) / 2
        assert ((both - ideal).abs() <= (bound + 1e-13) * ideal.abs()).all()


@pytest.mark.parametrize("strengths", [(0.0, 0.0), (0.5, 0.25), (1.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group-64"])
@pytest.mark.parametrize(("s", "g"), [(0.8, 1.7), (-0.3, 0.6), (2.5, -1.1)])
def test_inserted_norm_is_a_factor_on_the_weight_scale(strengths, granularity, s: float, g: float) -> None:
    """After a single-scale norm, a ternary linear's scalar norm is the factor g·s/√(s² + ε₂) on the same one without it."""
    linear = TernaryLinear(96, 24, bias=False, norm="scalar", granularity=granularity, eps=1e-5).double()
    plain = TernaryLinear(96, 24, bias=False, norm=None, granularity=granularity).double()
    plain.load_state_dict({"weight": linear.weight.detach()})
    for module in (linear, plain):
        module.set_strength(*strengths)
    assert linear.rms_norm is not None
    nn.init.constant_(linear.rms_norm.weight, g)
    x = torch.randn(7, 96, dtype=torch.float64)
    root = (s * s + 1e-5) ** 0.5
    with torch.no_grad():
        expected = linear(single(s, 1e-6)(x))
        got = plain(single(1.0, 1e-6 * 1e-5 / root**2)(x)) * (g * s / root)
        # In the ideal, both norms' eps gone, the output moves by no more than their bound.
        ideal = plain(single(1.0, 0.0)(x)) * g * (1 if s > 0 else -1)
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    bound = 1e-5 / s**2 * (1 + 1e-6 / x.pow(2).mean(-1).min().item()) / 2
    assert (ideal - expected).abs().max() <= (bound + 1e-12) * expected.abs().max() * 1.001
