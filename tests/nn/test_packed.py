"""Frozen ternary modules compute what the trained ones do at λ = 1."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilobit import quant
from trilobit.kernels import dispatch
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear
from trilobit.quant import Granularity

GRANULARITIES: list[Granularity] = ["tensor", "row", "group-64", "group-128", "group-256"]
SHAPES = [(12, 70), (5, 1), (1, 33), (8, 300)]


def trained(outputs: int, inputs: int, *, bias: bool = True, norm: str | None = "vector", **options) -> TernaryLinear:
    linear = TernaryLinear(inputs, outputs, bias, norm=norm, **options)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs) * 0.1)
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(outputs))
        if linear.rms_norm is not None:
            linear.rms_norm.weight.copy_(torch.rand_like(linear.rms_norm.weight) * 2 + 0.1)
    return linear


def in_float64(linear: TernaryLinear, x: Tensor) -> Tensor:
    """The definition at λ = 1 in float64, from the codes and scales of the fp32 latents."""
    rule = linear.rule
    scale = quant.absmean_scale(linear.weight, rule.granularity)
    codes = quant.ternary_codes(linear.weight, scale, rule.granularity)
    weight = quant.ternary_dequantize(codes, scale.double(), rule.granularity)
    x = x.double()
    if linear.rms_norm is not None:
        x = quant.rms_norm(x, linear.rms_norm.weight.double(), rule.eps)
    return F.linear(x, weight, None if linear.bias is None else linear.bias.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("norm", ["vector", "scalar", None])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_bit_exact(shape, granularity: Granularity, norm: str | None, bias: bool) -> None:
    """With a scale per tensor or row and int8 activations, fp32 outputs equal the trained module's bit for bit."""
    linear = trained(*shape, bias=bias, norm=norm, granularity=granularity)
    packed = PackedLinear.from_ternary(linear)
    for batch in ((2, 3), (4,), (1, 1, 2), ()):
        x = torch.randn(*batch, shape[1])
        with torch.no_grad():
            assert torch.equal(packed(x), linear(x)), batch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("int8", [True, False])
def test_every_rule_is_as_near_to_float64_as_a_plain_matmul(shape, granularity: Granularity, int8: bool) -> None:
    """Trained and frozen differ by at most 4 × what a plain fp32 matmul of those operands is off float64."""
    linear = trained(*shape, granularity=granularity, int8_activations=int8)
    packed = PackedLinear.from_ternary(linear)
    x = torch.randn(2, 5, shape[1])
    with torch.no_grad():
        ours, theirs = packed(x), linear(x)
    assert ours.shape == theirs.shape == (2, 5, shape[0])
    scale = quant.absmean_scale(linear.weight, granularity)
    matrix = quant.ternary_quantize(linear.weight, granularity)
    assert linear.rms_norm is not None
    inputs = quant.rms_norm(x, linear.rms_norm.weight.detach(), linear.rule.eps)
    inputs = quant.int8_quantize(inputs) if int8 else inputs
    assert torch.equal(packed.scale, scale)
    size = inputs.double().abs() @ matrix.double().abs().T + linear.bias.detach().abs()
    floor = size.max() * torch.finfo(torch.float32).eps * 4
    assert (ours - theirs).abs().max() <= floor
    if not int8:
        assert (ours - in_float64(linear, x)).abs().max() <= floor + (theirs - in_float64(linear, x)).abs().max()


@pytest.mark.parametrize("int8", [True, False])
def test_keeps_the_input_dtype_and_nothing_to_train(int8: bool) -> None:
    """A bf16 input gives bf16, computed in fp32 inside; no parameter but the shared norm's could be trained."""
    linear = trained(8, 16, int8_activations=int8)
    packed = PackedLinear.from_ternary(linear)
    x = torch.randn(3, 16).bfloat16()
    with torch.no_grad():
        assert packed(x).dtype == torch.bfloat16
        assert torch.equal(packed(x), packed(x.float()).bfloat16())
    assert {name for name, p in packed.named_parameters() if p.requires_grad} <= {"rms_norm.weight"}
    assert packed.codes.dtype == torch.int8
    assert set(packed.codes.unique().tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize(("granularity", "int8"), [("tensor", True), ("row", False), ("group-64", True), ("group-64", False)])
def test_autocast_changes_no_bit(granularity: Granularity, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 autocast every rule gives the bits it gives without, also where integer products are fp32 matmuls."""
    monkeypatch.setattr(dispatch, "_has_vnni", lambda: False)
    packed = PackedLinear.from_ternary(trained(8, 300, granularity=granularity, int8_activations=int8))
    x = torch.randn(3, 300)
    with torch.no_grad():
        plain = packed(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), plain)


def test_frozen_does_not_follow_the_latents() -> None:
    """Codes are taken once: changing the latent weight afterwards changes nothing."""
    linear = trained(8, 16)
    packed = PackedLinear.from_ternary(linear)
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = packed(x)
        linear.weight.neg_()
        assert torch.equal(packed(x), before)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_embedding_is_bit_exact(granularity: Granularity) -> None:
    """Rows of a frozen embedding equal the trained one's bit for bit, for any shape of ids."""
    trained = TernaryEmbedding.from_embedding(nn.Embedding(11, 70), granularity)
    packed = PackedEmbedding.from_ternary(copy.deepcopy(trained))
    for ids in (torch.tensor([[3, 0, 10], [3, 3, 1]]), torch.tensor(4)):
        with torch.no_grad():
            assert torch.equal(packed(ids), trained(ids))
    assert packed(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 70)
