"""The Triton kernels against quant.py, bit for bit; in Triton's interpreter where there is no GPU.

The interpreter takes a millisecond or so an operation and program: shapes are odd and small, blocks few.
"""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import families
from trilobit import quant
from trilobit.formats import LaneTwoBit
from trilobit.infer.stored import freeze
from trilobit.kernels import gpu
from trilobit.kernels.frozen_linear import frozen_choice
from trilobit.nn.packed import PackedLinear
from trilobit.nn.siblings import join_siblings
from trilobit.nn.ternary import InputRMSNorm
from trilobit.quant import Granularity
from trilobit.surgery.ternary import TernarySpec, ternarize

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRANULARITIES: list[Granularity] = ["tensor", "row", "group-64", "group-128", "group-256"]
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def awkward(tokens: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of normal numbers, with a row of zeros, one of ties (codes of k + ½) and one of tiny numbers among them."""
    x = torch.randn(tokens, inputs) * 3
    x[0] = 0
    if tokens > 2:
        x[1] = (torch.arange(inputs) % 200 - 100).float() + 0.5
        x[1, 0] = 127
        x[2] *= 1e-9
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs"), [(7, 300), (1, 1), (5, 4099), (0, 8)])
def test_quantiser_has_the_bits_of_the_definition(tokens: int, inputs: int, dtype: torch.dtype) -> None:
    """Codes and scales without a norm: zeros, ties, tiny rows, rows longer than a tile, none at all."""
    x = awkward(tokens, inputs, dtype) if tokens else random(tokens, inputs, dtype=dtype)
    codes, scale, inverse = gpu.norm_quantize(x, None, EPS)
    expected, expected_scale = quant.int8_codes(x)
    assert inverse is None
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
def test_quantiser_on_what_is_not_finite() -> None:
    """A row with NaN has a scale that is NaN, one with infinity an infinite scale; their neighbours are as ever."""
    x = random(4, 70)
    x[1, 3], x[2, 5] = float("nan"), float("-inf")
    codes, scale, _ = gpu.norm_quantize(x, None, EPS)
    expected, expected_scale = quant.int8_codes(x)
    assert torch.equal(scale.isnan(), expected_scale.isnan())
    assert torch.equal(scale.nan_to_num(), expected_scale.nan_to_num())
    assert torch.equal(codes[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "scalar"), [(7, 300, False), (6, 300, True), (3, 1, False), (2, 4099, False)])
def test_norm_and_quantiser_in_one(tokens: int, inputs: int, scalar: bool, dtype: torch.dtype) -> None:
    """1/rms is that of float64 to two last bits; codes and scales are, to the bit, those of what it and the gain make of x."""
    x, gain = awkward(tokens, inputs, dtype), (torch.rand(1 if scalar else inputs) + 0.5).to(DEVICE)
    codes, scale, inverse = gpu.norm_quantize(x, gain, EPS)
    assert inverse is not None
    exact = torch.rsqrt(x.double().square().mean(dim=1, keepdim=True) + EPS)
    assert ((inverse.double() / exact - 1).abs() <= 4 * torch.finfo(torch.float32).eps).all()
    expected, expected_scale = quant.int8_codes((x.float() * inverse) * gain)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "scalar"), [(7, 300, False), (6, 300, True), (0, 8, False), (1, 1, False)])
def test_backward_of_the_norm(tokens: int, inputs: int, scalar: bool, dtype: torch.dtype) -> None:
    """Both gradients are float64's up to a rounding and the last bits of fp32 sums; with and without a factor."""
    x, gain = random(tokens, inputs, dtype=dtype), (torch.rand(1 if scalar else inputs) + 0.5).to(DEVICE)
    dnormed = random(tokens, inputs, dtype=dtype)
    _, _, inverse = gpu.norm_quantize(x, gain, EPS)
    assert inverse is not None
    for factor in (None, torch.tensor([[0.37]], device=DEVICE)):
        d = dnormed.double() * (1.0 if factor is None else factor.double())
        leaves = x.double().requires_grad_(), gain.double().requires_grad_()
        exact = torch.autograd.grad(quant.rms_norm(*leaves, EPS), leaves, d)
        normalized = x.double() * inverse
        product, mean = (d * normalized).abs(), (d * normalized * gain).abs().mean(dim=1, keepdim=True) if inputs else 0
        terms = inverse * ((d * gain).abs() + normalized.abs() * mean), product.sum() if scalar else product.sum(dim=0)
        found = gpu.norm_backward(x, inverse, gain, dnormed, factor)
        for got, value, like, magnitude in zip(found, exact, (x, gain), terms, strict=True):
            assert got.shape == like.shape
            assert got.dtype == like.dtype
            bound = 0.51 * torch.finfo(got.dtype).eps * value.abs() + 4 * torch.finfo(torch.float32).eps * magnitude + 1e-7
            assert ((got.double() - value).abs() <= bound).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ternary_codes(granularity: Granularity) -> None:
    """Codes of weights of odd shapes, with zeros and ties among them, are the definition's."""
    group = quant.group_size(granularity) or 0
    for shape in [(5, 300), (1, 1), (3, 1100), (0, 64), (9, 64)]:
        weight = random(*shape) * 0.05
        weight.view(-1)[:2] = 0
        scale = quant.absmean_scale(weight, granularity)
        if weight.numel() > 4:
            weight.view(-1)[2:4] = scale.view(-1)[0] / 2  # a tie: code 0
        assert torch.equal(gpu.ternarize(weight, scale, group), quant.ternary_codes(weight, scale, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_linear_has_the_bits_of_the_definition(granularity: Granularity) -> None:
    """Every granule, with bias and without, of odd shapes, more than one tile, and no tokens; rounded last to any dtype."""
    for (tokens, outputs, inputs), bias in product([(3, 5, 300), (150, 131, 256), (17, 130, 70), (0, 5, 8)], (True, False)):
        weight, x = random(outputs, inputs), awkward(tokens, inputs) if tokens else random(tokens, inputs)
        scale = quant.absmean_scale(weight, granularity)
        operands = *quant.int8_codes(x), quant.ternary_codes(weight, scale, granularity), scale
        b = random(outputs) if bias else None
        expected = quant.integer_linear(*operands, b, granularity)
        group = quant.group_size(granularity) or 0
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(gpu.int8_linear(*operands, b, group, dtype), expected.to(dtype)), (tokens, outputs, inputs)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_two_bit_linear_has_the_bits_of_the_definition(granularity: Granularity) -> None:
    """One token, a few and many, of odd shapes, every granule, with bias and without; rounded last to any dtype."""
    shapes = [(1, 37, 300), (2, 1, 16), (5, 37, 1100), (16, 9, 70), (17, 131, 300), (0, 5, 8)]
    group = quant.group_size(granularity) or 0
    for number, (tokens, outputs, inputs) in enumerate(shapes):
        weight, x = random(outputs, inputs), awkward(tokens, inputs) if tokens else random(tokens, inputs)
        scale = quant.absmean_scale(weight, granularity)
        codes, x_scale = quant.int8_codes(x)
        codes[:, :1] = -128
        weight_codes = quant.ternary_codes(weight, scale, granularity)
        b = random(outputs) if number % 2 else None
        expected = quant.integer_linear(codes, x_scale, weight_codes, scale, b, granularity)
        packed = LaneTwoBit.pack(weight_codes)
        for dtype in (torch.float32, torch.bfloat16):
            found = gpu.packed_linear(codes, x_scale, packed, scale, b, group, dtype)
            assert torch.equal(found, expected.to(dtype)), (tokens, outputs, inputs)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_packed_linear_picks_the_kernels(granularity: Granularity) -> None:
    """PackedLinear packs lanes at the first use, and has the definition's bits without a norm; with one, those of the kernel's
    codes; in the input's dtype."""
    for norm, dtype in product((None, InputRMSNorm(300).to(DEVICE)), (torch.float32, torch.bfloat16)):
        weight, x = random(37, 300), random(2, 3, 300, dtype=dtype)
        scale = quant.absmean_scale(weight, granularity)
        codes, bias = quant.ternary_codes(weight, scale, granularity), random(37)
        module = PackedLinear(codes, scale, bias, norm, granularity, True)
        assert frozen_choice(DEVICE, dtype).name == "triton"
        with torch.no_grad():
            y = module(x)
        assert module._packed is not None
        assert torch.equal(LaneTwoBit.unpack(module._packed[2], 300), codes)
        levels, x_scale, _ = gpu.norm_quantize(x.flatten(0, 1), None if norm is None else norm.weight.detach(), EPS)
        expected = quant.integer_linear(levels, x_scale, codes, scale, bias, granularity)
        assert y.dtype == dtype
        assert torch.equal(y, expected.to(dtype).view(2, 3, 37))


class Attention(nn.Module):
    """Three linears that read one input, as transformers calls them."""

    def __init__(self, sizes: tuple[int, ...], inputs: int, granularity: Granularity, norms: str, biased: bool):
        super().__init__()
        for name, outputs in zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True):
            weight = random(outputs, inputs) * 0.05
            scale = quant.absmean_scale(weight, granularity)
            norm = None if norms == "none" else InputRMSNorm(inputs, scalar=norms == "scalar", eps=EPS).to(DEVICE)
            if norm is not None:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
            bias = random(outputs) if biased and name != "k_proj" else None
            codes = quant.ternary_codes(weight, scale, granularity)
            setattr(self, name, PackedLinear(codes, scale, bias, norm, granularity, True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.mark.parametrize(
    ("granularity", "norms"), [("tensor", "none"), ("tensor", "vector"), ("row", "scalar"), ("group-64", "vector")]
)
def test_siblings_have_the_bits_of_each(granularity: Granularity, norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v in two launches give what they give one by one, biases of some included; a token or a few; where norms of
    their own would share a block of rows, or tokens are many, one by one it is. What is changed afterwards counts."""
    launches: list[int] = []
    merged = gpu.merged_linear
    monkeypatch.setattr(gpu, "merged_linear", lambda *a: launches.append(1) or merged(*a))
    even = 128 if granularity == "group-64" else 16
    shapes = [((even, 2 * even, 5), 300, 1), ((19, 5, 7), 70, 1), ((even, even, even), 301, 3), ((16, 16, 3), 70, 17)]
    for sizes, inputs, tokens in shapes:
        module = Attention(sizes, inputs, granularity, norms, biased=inputs == 300)
        alone, x = copy.deepcopy(module), random(tokens, inputs)
        join_siblings(module)
        assert module.k_proj.siblings is module.q_proj.siblings is not None and alone.q_proj.siblings is None
        with torch.no_grad():
            assert torch.equal(module(x), alone(x))
            assert torch.equal(module.v_proj(x), alone.v_proj(x)), "called by itself"
            assert len(launches) == (tokens <= 16 and (norms == "none" or sizes[0] == even))
            for changed in (module, alone):
                changed.k_proj.codes.neg_()
                changed.v_proj.scale.mul_(2)
            assert torch.equal(module(x[:1]), alone(x[:1]))
            assert torch.equal(copy.deepcopy(module)(x[:1]), alone(x[:1]))
        launches.clear()


def test_who_are_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears of one input that are quantised alike, all with norms or none; a layer's q, k and v and its gate and up. A model
    has the logits that it has without siblings (a copy has none): of one token the same bits, of several up to what torch's
    attention makes of other strides."""
    model = families.build("llama")
    ternarize(model, TernarySpec(placement="output"))
    frozen = freeze(model)
    alone, launches, merged = copy.deepcopy(frozen), [], gpu.merged_linear
    monkeypatch.setattr(gpu, "merged_linear", lambda *a: launches.append(1) or merged(*a))
    with torch.no_grad():
        one, several = families.tokens(1, 1), families.tokens(2, 3)
        expected = alone(one).logits, alone(several).logits
        assert launches == []
        assert torch.equal(frozen(one).logits, expected[0])
        torch.testing.assert_close(frozen(several).logits, expected[1], rtol=1e-5, atol=1e-5)
    assert len(launches) == 4 * frozen.config.num_hidden_layers
    attention, mlp = frozen.get_submodule("model.layers.0.self_attn"), frozen.get_submodule("model.layers.0.mlp")
    assert {linear.siblings for linear in (attention.q_proj, attention.k_proj, attention.v_proj)} == {attention.q_proj.siblings}
    assert mlp.gate_proj.siblings is mlp.up_proj.siblings not in (None, attention.q_proj.siblings)
    assert mlp.down_proj.siblings is None and attention.o_proj.siblings is None
    odd = Attention((16, 16, 16), 64, "tensor", "none", biased=False)
    odd.k_proj.rms_norm = InputRMSNorm(64, eps=EPS)
    join_siblings(odd)
    assert odd.q_proj.siblings is None


def test_compiled_inference_is_one_graph() -> None:
    """torch.compile(fullgraph=True) keeps the operators whole and the bits, whether packed before or while tracing."""
    torch.compiler.reset()
    weight, x = random(37, 70), random(4, 70)
    scale = quant.absmean_scale(weight)
    with torch.no_grad():
        for warm in (True, False):
            module = PackedLinear(quant.ternary_codes(weight, scale), scale, None, InputRMSNorm(70).to(DEVICE), "tensor", True)
            expected = copy.deepcopy(module)(x)
            if warm:
                module(x)
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), expected)
    siblings = Attention((16, 32, 5), 70, "tensor", "vector", biased=True)
    with torch.no_grad():
        expected = copy.deepcopy(siblings)(x)
        join_siblings(siblings)
        assert torch.equal(torch.compile(siblings, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(siblings(x), expected)
    torch.compiler.reset()


def test_operators_are_well_formed() -> None:
    """torch's own checks of schema, fake kernels and dispatch pass."""
    x, gain, weight = random(3, 70), random(70), random(5, 70)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.trilobit
    codes, scale, inverse = ops.norm_quantize(x, gain, EPS)
    weight_scale = quant.absmean_scale(weight)
    weight_codes = ops.ternarize(weight, weight_scale, 0)
    torch.library.opcheck(ops.norm_quantize.default, (x, None, EPS), test_utils=tests)
    torch.library.opcheck(ops.norm_backward.default, (x, inverse, gain, x, None), test_utils=tests)
    torch.library.opcheck(ops.ternarize.default, (weight, weight_scale, 0), test_utils=tests)
    arguments = (codes, scale, weight_codes, weight_scale, None, 0, torch.bfloat16)
    torch.library.opcheck(ops.int8_linear.default, arguments, test_utils=tests)
    arguments = (codes, scale, LaneTwoBit.pack(weight_codes), weight_scale, None, 0, torch.bfloat16)
    torch.library.opcheck(ops.packed_linear.default, arguments, test_utils=tests)
