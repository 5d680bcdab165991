"""The ternary modules: names, strengths, shared storage, and what they compute."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trilobit import quant
from trilobit.nn.packed import PackedLinear
from trilobit.nn.ternary import InputRMSNorm, TernaryEmbedding, TernaryLinear, ternary_modules
from trilobit.quant import Granularity

GRANULARITIES: list[Granularity] = ["tensor", "row", "group-64", "group-128", "group-256"]


@pytest.mark.parametrize("norm", ["vector", "scalar", None])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_names(norm: str | None, bias: bool) -> None:
    """Parameters are `weight`, `bias`, `rms_norm.weight` as transformers names them, fp32, and blending adds none."""
    linear = TernaryLinear(6, 4, bias, norm=norm)
    linear.set_strength(0.5, 0.5)
    expected = {"weight": (4, 6)} | ({"bias": (4,)} if bias else {})
    expected |= {"rms_norm.weight": (6,) if norm == "vector" else (1,)} if norm else {}
    assert {name: tuple(value.shape) for name, value in linear.state_dict().items()} == expected
    assert all(value.dtype == torch.float32 for value in linear.state_dict().values())
    assert not list(linear.buffers())
    other = TernaryLinear(6, 4, bias, norm=norm)
    other.load_state_dict(linear.state_dict(), strict=True)


@pytest.mark.parametrize(
    "make", [lambda: TernaryLinear(5, 3), lambda: TernaryEmbedding.from_embedding(nn.Embedding(5, 3), "row")]
)
def test_strengths(make) -> None:
    """λ starts at 1; ends are floats; inside, one tensor per kind is overwritten in place, ends in between or not."""
    module = make()
    assert (module.weight_strength, module.activation_strength) == (1.0, 1.0)
    module.set_strength(0.25, 0.75)
    weights, activations = module.weight_strength, module.activation_strength
    assert isinstance(weights, torch.Tensor)
    assert isinstance(activations, torch.Tensor)
    assert weights is not activations
    assert (weights.item(), activations.item()) == (0.25, 0.75)
    module.set_strength(0.5, 0)
    assert module.weight_strength is weights
    assert weights.item() == 0.5
    assert module.activation_strength == 0.0
    assert isinstance(module.activation_strength, float)
    module.set_strength(1, 0.125)
    assert isinstance(module.weight_strength, float)
    assert module.activation_strength is activations
    assert activations.item() == 0.125
    for bad in ((-0.1, 0.0), (0.0, 1.1), (float("nan"), 0.0)):
        with pytest.raises(AssertionError):
            module.set_strength(*bad)


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_fp32_and_widens_the_rest(bias: bool) -> None:
    """An fp32 linear's tensors are shared; a bf16 linear's become fp32 latents of the same values."""
    linear = nn.Linear(6, 4, bias)
    ternary = TernaryLinear.from_linear(linear, norm="scalar", granularity="row", int8_activations=False, eps=1e-5)
    assert ternary.weight.data_ptr() == linear.weight.data_ptr()
    assert ternary.rule.granularity == "row"
    assert not ternary.rule.int8_activations
    assert ternary.rule.eps == 1e-5
    assert ternary.rms_norm is not None
    assert ternary.rms_norm.weight.tolist() == [1.0]
    assert (ternary.bias is None) == (not bias)
    if bias:
        assert ternary.bias.data_ptr() == linear.bias.data_ptr()
    narrow = nn.Linear(6, 4, bias).bfloat16()
    wide = TernaryLinear.from_linear(narrow)
    assert torch.equal(wide.weight, narrow.weight.float())
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    assert all(not p.is_meta and p.requires_grad for p in (*ternary.parameters(), *wide.parameters()))


def test_linear_is_norm_then_quantised_product() -> None:
    """The module computes integer_linear of its normed input at λ = 1, its own eps and gain included."""
    for norm, bias in (("vector", True), ("scalar", False), (None, True)):
        linear = TernaryLinear(70, 5, bias, norm=norm, eps=1e-2)
        if linear.rms_norm is not None:
            nn.init.uniform_(linear.rms_norm.weight, 0.5, 2)
        x = torch.randn(2, 3, 70) * 0.1
        h = x if linear.rms_norm is None else quant.rms_norm(x, linear.rms_norm.weight, 1e-2)
        scale = quant.absmean_scale(linear.weight)
        codes = quant.ternary_codes(linear.weight, scale)
        bias_ = linear.bias.detach() if bias else None
        assert torch.equal(linear(x), quant.integer_linear(*quant.int8_codes(h), codes, scale, bias_, "tensor"))


def test_input_norm_is_rms_norm() -> None:
    """InputRMSNorm is quant.rms_norm, which is torch's rms_norm but for rounding."""
    norm = InputRMSNorm(7, eps=1e-3).double()
    nn.init.uniform_(norm.weight)
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (7,), norm.weight, 1e-3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("strength", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("padding", [None, 2])
def test_embedding_is_a_lookup_in_the_quantised_table(granularity: Granularity, strength: float, padding: int | None) -> None:
    """Output and gradient equal F.embedding of the whole faded table: repeats add up, the padding row gets none."""
    embedding = nn.Embedding(11, 300, padding_idx=padding)
    nn.init.normal_(embedding.weight)
    ternary = TernaryEmbedding.from_embedding(embedding, granularity)
    assert ternary.weight.data_ptr() == embedding.weight.data_ptr()
    ternary.set_strength(strength, 1.0)
    ids = torch.tensor([[3, 3, 2], [10, 0, 3]])
    y = ternary(ids)
    faded = quant.fade(embedding.weight, quant.ternary_quantize(embedding.weight, granularity), ternary.weight_strength)
    expected = F.embedding(ids, faded, padding)
    assert y.shape == (2, 3, 300)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert ternary.weight.grad is not None
    assert embedding.weight.grad is not None
    assert torch.equal(ternary.weight.grad, embedding.weight.grad)
    assert ternary.weight.grad[3].any()


def test_deepcopy_is_independent() -> None:
    """A copy computes the same, and neither its parameters nor its λ follow the original's."""
    for module, x in (
        (TernaryLinear(70, 5), torch.randn(3, 70)),
        (TernaryEmbedding.from_embedding(nn.Embedding(9, 70), "row"), torch.tensor([1, 8])),
    ):
        module.set_strength(0.5, 0.25)
        twin = copy.deepcopy(module)
        before = module(x)
        assert torch.equal(twin(x), before)
        module.set_strength(0.9, 0.8)
        assert torch.equal(twin(x), before)
        assert not torch.equal(module(x), before)
        twin.set_strength(0.75, 0.5)
        assert module.weight_strength.item() == pytest.approx(0.9)
        assert twin.weight_strength.item() == 0.75
        with torch.no_grad():
            twin.weight.zero_()
        assert module.weight.any()


def test_ternary_modules_lists_them_all_in_order() -> None:
    """Every ternary module is listed once, with its path, in module order; others are not."""
    model = nn.Sequential(nn.Linear(2, 2), TernaryLinear(2, 2), nn.Sequential(TernaryLinear(2, 2), nn.ReLU()))
    assert [name for name, _ in ternary_modules(model)] == ["1", "2.0"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_changing_a_blending_strength_does_not_recompile() -> None:
    """A compiled module is traced once per state (off, blending, on), however often λ changes, and follows λ."""
    torch.compiler.reset()
    traced = 0

    def backend(graph: torch.fx.GraphModule, _: object):
        nonlocal traced
        traced += 1
        return graph.forward

    linear = TernaryLinear(33, 5)
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    x = torch.randn(4, 33)
    linear.set_strength(0.1, 0.1)
    compiled(x)
    first = traced
    for strength in (0.2, 0.5, 0.9):
        linear.set_strength(strength, strength)
        torch.testing.assert_close(compiled(x), linear(x))
    assert traced == first == 1
    linear.set_strength(1, 1)
    torch.testing.assert_close(compiled(x), linear(x))
    assert traced == 2
    torch.compiler.reset()


OTHERS = {"dead_zone_bias": 1e-2, "granularity": "group-64"}, {"learned_ranges": True, "granularity": "row"}


@pytest.mark.parametrize("options", OTHERS, ids=["tequila", "paretoq"])
@pytest.mark.parametrize("bias", [True, False])
def test_other_quantisers_fade_in_and_freeze(options: dict[str, Any], bias: bool) -> None:
    """Other people's quantisers are the plain linear at λ = 0, differ from ours at λ = 1, are halfway between at λ = ½, train
    every parameter, and PackedLinear freezes the function they have at λ = 1."""
    torch.manual_seed(0)
    plain, x = nn.Linear(130, 7, bias=bias), torch.randn(3, 130)
    linear = TernaryLinear.from_linear(plain, int8_activations=False, norm=None, **options)
    ours = TernaryLinear.from_linear(plain, int8_activations=False, norm=None, granularity=options["granularity"])
    outputs = []
    for strength in (0.0, 0.5, 1.0):
        linear.set_strength(strength, 0.0)
        outputs.append(linear(x))
    assert torch.equal(outputs[0], plain(x))
    torch.testing.assert_close(outputs[1], (outputs[0] + outputs[2]) / 2)
    assert not torch.allclose(outputs[2], ours(x), rtol=1e-3)
    outputs[2].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in linear.parameters())
    torch.testing.assert_close(PackedLinear.from_ternary(linear)(x), outputs[2], rtol=1e-5, atol=1e-6)
    if "dead_zone_bias" in options:
        added = quant.dead_zone_sum(plain.weight, "group-64") * 1e-2
        torch.testing.assert_close(outputs[2], ours(x) + added)
    else:
        assert torch.equal(linear.ranges, plain.weight.abs().amax(dim=1, keepdim=True))
