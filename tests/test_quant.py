"""The quantisation arithmetic against references in plain Python and numpy that share no code with it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from trilobit import quant
from trilobit.quant import EXACT_IN_FP32, FLOOR, INT8_MAX, Granularity

GRANULARITIES: list[Granularity] = ["tensor", "row", "group-64", "group-128", "group-256"]
WIDTHS = [1, 5, 63, 64, 65, 130, 257, 300]
BITWISE = {torch.float32: torch.int32, torch.float64: torch.int64, torch.float16: torch.int16}


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(BITWISE[a.dtype]), b.view(BITWISE[b.dtype]))


def granules(inputs: int, granularity: Granularity) -> list[slice]:
    if not granularity.startswith("group"):
        return [slice(0, inputs)]
    width = int(granularity.split("-")[1])
    return [slice(start, min(start + width, inputs)) for start in range(0, inputs, width)]


def naive_scale(weight: np.ndarray, granularity: Granularity) -> np.ndarray:
    """Exact sums (math.fsum), one rounding to the type of the weight, the floor, and fp16 for groups."""
    kind = weight.dtype.type
    blocks = [weight] if granularity == "tensor" else list(weight[:, None])
    table = []
    for block in blocks:
        row = []
        for part in granules(weight.shape[1], granularity):
            values = [abs(float(v)) for v in block[:, part].ravel()]
            scale = max(kind(math.fsum(values) / len(values)), kind(FLOOR))
            row.append(kind(np.float16(scale)) if granularity.startswith("group") else scale)
        table.append(row)
    return np.array(table, dtype=weight.dtype)


def naive_codes(weight: np.ndarray, scale: np.ndarray, granularity: Granularity) -> np.ndarray:
    kind = weight.dtype.type
    codes = np.zeros(weight.shape, dtype=np.int8)
    for o in range(weight.shape[0]):
        for g, part in enumerate(granules(weight.shape[1], granularity)):
            reciprocal = kind(1) / scale[o if scale.shape[0] > 1 else 0, g]
            for k in range(part.start, part.stop):
                codes[o, k] = max(-1, min(1, round(float(weight[o, k] * reciprocal))))  # Python rounds half to even
    return codes


def naive_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kind = x.dtype.type
    codes, scales = np.zeros(x.shape, dtype=np.int8), np.zeros((x.shape[0], 1), dtype=x.dtype)
    for t, row in enumerate(x):
        absmax = max(max(abs(v) for v in row), kind(FLOOR))
        scales[t] = absmax / kind(127)
        factor = kind(1) / absmax * kind(127)  # as torch computes 127 / tensor
        codes[t] = [max(-128, min(127, round(float(v * factor)))) for v in row]
    return codes, scales


def floats(width: int = 32, bound: float = 4.0) -> st.SearchStrategy[float]:
    exact = st.integers(-16, 16).map(lambda n: n / 8)
    return st.one_of(exact, st.floats(-bound, bound, width=width), st.sampled_from([0.0, -0.0, 1e-30, -1e-7, 3e4]))


@st.composite
def matrices(draw: st.DrawFn, rows: int = 4) -> np.ndarray:
    shape = draw(st.tuples(st.integers(1, rows), st.sampled_from(WIDTHS)))
    kind = draw(st.sampled_from([np.float32, np.float64]))
    if draw(st.booleans()):
        return draw(arrays(kind, shape, elements=floats(), fill=st.sampled_from([0.0, 1.0])))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal(shape)
    return (values * 10.0 ** draw(st.integers(-7, 4))).astype(kind)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(matrices())
def test_scales_and_codes_equal_the_naive_ones(granularity: Granularity, weight: np.ndarray) -> None:
    """Scales (in fp64 but for the order of a sum), codes and values have the reference's bits at every shape."""
    tensor = torch.from_numpy(weight)
    got = quant.absmean_scale(tensor, granularity)
    expected = torch.from_numpy(naive_scale(weight, granularity))
    if tensor.dtype == torch.float32:
        assert equal_bits(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)
    scale = got.numpy()
    codes = naive_codes(weight, scale, granularity)
    got_codes = quant.ternary_codes(tensor, got, granularity)
    assert got_codes.dtype == torch.int8
    assert np.array_equal(got_codes.numpy(), codes)
    quantized = quant.ternary_quantize(tensor, granularity)
    widths = [part.stop - part.start for part in granules(weight.shape[1], granularity)]
    assert torch.equal(
        quantized, torch.from_numpy(codes * np.repeat(scale, widths, axis=1) if len(widths) > 1 else codes * scale)
    )


@given(matrices())
def test_int8_equals_the_naive_one(x: np.ndarray) -> None:
    """Activation codes and scales equal the reference's bits, in fp32 and fp64."""
    codes, scales = naive_int8(x)
    got, scale = quant.int8_codes(torch.from_numpy(x))
    assert got.dtype == torch.int8
    assert np.array_equal(got.numpy(), codes)
    assert equal_bits(scale, torch.from_numpy(scales))
    assert torch.equal(quant.int8_quantize(torch.from_numpy(x)), torch.from_numpy(codes.astype(x.dtype) * scales))  # −0 = 0


def test_ties_go_to_even() -> None:
    """±0.5 s rounds to 0 and ±1.5 s clips to ±1; an activation code n + ½ rounds to the even neighbour."""
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5, 2.0, 0.0, -1.0, 1.0]])
    assert quant.absmean_scale(weight).item() == 1.0
    assert quant.ternary_codes(weight, torch.ones(1, 1)).tolist() == [[0, 0, 1, -1, 1, 0, -1, 1]]
    above = torch.nextafter(torch.tensor([[0.5, -0.5]]), torch.tensor([[1.0, -1.0]]))
    assert quant.ternary_codes(above, torch.ones(1, 1)).tolist() == [[1, -1]]
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5, 127.0]])
    assert (127 / torch.tensor(508.0)).item() == 0.25
    codes = quant.int8_codes(x * 4)[0]
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 126, -126, 127]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_stay_zero(granularity: Granularity) -> None:
    """An all-zero matrix, row, group or token has the floor as its scale and quantises to zeros, without NaN."""
    weight = torch.randn(3, 300)
    weight[1] = 0
    weight[2, 64:] = 0
    assert not quant.ternary_quantize(weight, granularity)[1].any()
    assert not quant.ternary_quantize(weight, granularity)[2, 64:].any()
    zero = torch.zeros(3, 300)
    floor = torch.tensor(FLOOR)
    assert torch.equal(quant.absmean_scale(zero, "row"), floor.expand(3, 1))
    assert torch.equal(quant.absmean_scale(zero, "group-64"), floor.half().float().expand(3, 5))
    assert not quant.ternary_quantize(zero, granularity).any()
    assert not quant.int8_quantize(zero).any()
    assert torch.equal(quant.int8_codes(zero)[1], (floor / INT8_MAX).expand(3, 1))


def test_huge_and_tiny() -> None:
    """Values at the ends of fp32 keep their order and stay finite; only a group scale beyond fp16 turns non-finite."""
    for size in (1e37, 1e-4, 1e-20):
        weight = torch.randn(4, 96).sign() * size
        quantized = quant.ternary_quantize(weight, "row")
        assert torch.equal(quantized, weight) if size > FLOOR else not quantized.any()
        assert quant.int8_quantize(weight).isfinite().all()
    assert quant.ternary_quantize(torch.full((1, 64), 6e4), "group-64").isfinite().all()
    assert not quant.ternary_quantize(torch.full((1, 64), 1e5), "group-64").isfinite().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_non_finite_values_stay_visible(granularity: Granularity, bad: float) -> None:
    """NaN or infinity makes its whole granule (or token) non-finite and no other."""
    weight = torch.randn(3, 300)
    weight[1, 70] = bad
    expected = torch.ones(3, 300, dtype=torch.bool)
    if granularity == "tensor":
        expected[:] = False
    elif granularity == "row":
        expected[1] = False
    else:
        width = int(granularity.split("-")[1])
        expected[1, 70 // width * width : (70 // width + 1) * width] = False
    assert torch.equal(quant.ternary_quantize(weight, granularity).isfinite(), expected)
    assert quant.int8_quantize(weight).isfinite().all(dim=1).tolist() == [True, False, True]
    assert not quant.int8_quantize(weight)[1].isfinite().any()
    x, scale = quant.int8_codes(torch.ones(1, 300))
    weight_scale = quant.absmean_scale(weight, granularity)
    y = quant.integer_linear(x, scale, quant.ternary_codes(weight, weight_scale, granularity), weight_scale, None, granularity)
    assert y.isfinite().tolist() == [[granularity != "tensor", False, granularity != "tensor"]]


def test_group_scales_are_fp16_in_the_forward() -> None:
    """A group scale survives fp16, is the nearest fp16 to the mean, and codes are taken with the rounded scale."""
    weight = torch.randn(64, 256)
    scale = quant.absmean_scale(weight, "group-64")
    mean = weight.double().abs().unflatten(1, (-1, 64)).mean(2).float()
    assert torch.equal(scale, mean.half().float())
    assert not torch.equal(scale, mean)
    assert torch.equal(quant.ternary_quantize(weight, "group-64").abs().unique(), torch.cat([torch.zeros(1), scale.unique()]))
    # 1.5·s lies between the two candidates' thresholds only if the scale was rounded first.
    mean_scale, rounded = 1.0 + 2**-11 * 0.9, 1.0
    row = torch.full((1, 64), mean_scale)
    row[0, 0] = (mean_scale + rounded) / 4
    row[0, 1] += mean_scale - row[0, 0].item()
    assert quant.absmean_scale(row, "group-64").item() == rounded
    assert quant.ternary_codes(row, quant.absmean_scale(row, "group-64"), "group-64")[0, 0] == 1
    assert quant.ternary_codes(row, torch.tensor([[mean_scale]]), "group-64")[0, 0] == 0


def test_scale_does_not_depend_on_sharding() -> None:
    """The mean of float64 means over shards, rounded once, is the scale; fp32 means are not stable in this way."""
    fp32_differs = 0
    for seed in range(40):
        weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(seed)) * 0.02
        whole = quant.absmean_scale(weight)
        for shards in (weight.chunk(4, dim=0), weight.chunk(5, dim=1), weight.T.contiguous().chunk(8)):
            mean = torch.stack([shard.abs().mean(dtype=torch.float64) for shard in shards]).mean()
            assert torch.equal(mean.float().reshape(1, 1), whole)
            fp32_differs += int(torch.stack([shard.abs().mean() for shard in shards]).mean() != whole)
        rows = torch.cat([quant.absmean_scale(shard, "row") for shard in weight.chunk(4)])
        assert torch.equal(rows, quant.absmean_scale(weight, "row"))
        assert torch.equal(quant.absmean_scale(weight.bfloat16()), quant.absmean_scale(weight.bfloat16().float()))
    assert fp32_differs > 0


def transformers_formulas() -> Any:
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    return bitnet.WeightQuant, bitnet.ActQuant


def test_codes_are_those_of_transformers() -> None:
    """WeightQuant and ActQuant of transformers' AutoBitLinear give the same codes, ties included."""
    weight_quant, act_quant = transformers_formulas()
    with torch.compiler.set_stance("force_eager"):
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            # Few-bit values: their fp32 mean is exact in any order, and many of them are ties.
            weight = torch.randint(-8, 9, (32, 64), generator=generator) / 16
            weight[0, 0] += 4 - (weight.abs().sum() % 4)
            theirs = weight_quant.apply(weight)
            assert torch.equal(theirs.sign().to(torch.int8), quant.ternary_codes(weight, quant.absmean_scale(weight)))
            x = torch.randn(33, 70, generator=generator) * 10.0 ** (seed - 6)
            x[3] = torch.randint(-254, 255, (70,), generator=generator) / 2
            x[3, 0] = 508.0
            codes, scale = quant.int8_codes(x)
            assert torch.equal((act_quant.apply(x) / scale).round().to(torch.int8), codes)
            torch.testing.assert_close(act_quant.apply(x), quant.int8_quantize(x), rtol=3e-7, atol=0)


def test_transformers_agree_on_ordinary_weights_up_to_their_fp32_mean() -> None:
    """On Gaussian weights a code may differ only where W/s is within an fp32 mean's error of a threshold."""
    weight_quant, _ = transformers_formulas()
    with torch.compiler.set_stance("force_eager"):
        weight = torch.randn(64, 96) * 0.02
        scale = quant.absmean_scale(weight)
        differs = weight_quant.apply(weight).sign() != quant.ternary_codes(weight, scale)
        assert ((weight / scale).abs()[differs] - 0.5).abs().le(1e-6).all()


def test_fade_is_exact_at_its_ends() -> None:
    """λ = 1 returns Q(x)'s bits and λ = 0 x's bits, infinities included, where x + (Q − x) loses them."""
    x = torch.randn(64, 128)
    quantized = quant.int8_quantize(x)
    assert equal_bits(quant.fade(x, quantized, 1.0), quantized)
    assert equal_bits(quant.fade(x, quantized, 0.0), x)
    ternary = quant.ternary_quantize(x)
    assert equal_bits(quant.fade(x, ternary, 1.0), ternary)
    assert (x + (ternary - x) != ternary).float().mean() > 0.01  # the formula with a detach trick
    wild = torch.tensor([math.inf, -math.inf, 1e38, -0.0])
    assert equal_bits(quant.fade(wild, torch.zeros(4), 0.0), wild)
    assert equal_bits(quant.fade(wild, torch.ones(4), 1), torch.ones(4))
    half = quant.fade(x.bfloat16(), quantized, 1.0)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, quantized.bfloat16())


@given(st.floats(0.01, 0.99), st.booleans())
def test_fade_blends_between_its_ends(strength: float, as_tensor: bool) -> None:
    """Between the ends the value is x + λ·(Q(x) − x), for a number and for a 0-dim tensor."""
    x = torch.randn(3, 5, dtype=torch.float64)
    quantized = quant.int8_quantize(x)
    got = quant.fade(x, quantized, torch.tensor(strength, dtype=torch.float64) if as_tensor else strength)
    expected = (1 - strength) * x + strength * quantized
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("strength", [0.0, 1.0, 0.3, torch.tensor(0.3)])
def test_fade_passes_the_gradient_unchanged(strength: float | Tensor) -> None:
    """The gradient reaches x as it came, does not reach Q, and the outputs never alias their inputs."""
    x, quantized = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    y = quant.fade(x, quantized, strength)
    gradient = torch.randn(4, 5)
    y.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient)
    assert quantized.grad is None
    with torch.no_grad():
        detached = quantized.clone()
        quant.fade(x.detach(), detached, strength).add_(1) if strength != 0.0 else None
        assert torch.equal(detached, quantized)


def python_integer_linear(
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    granularity: Granularity,
) -> np.ndarray:
    kind = scale.numpy().dtype.type
    x, w, sx, sw = codes.tolist(), weight_codes.tolist(), scale.numpy(), weight_scale.numpy()
    y = np.zeros((len(x), len(w)), dtype=kind)
    for t, row in enumerate(x):
        for o, column in enumerate(w):
            scales = sw[o if sw.shape[0] > 1 else 0]
            sums = [sum(a * b for a, b in zip(row[p], column[p], strict=True)) for p in granules(len(row), granularity)]
            if granularity.startswith("group"):
                total = kind(0)
                for value, s in zip(sums, scales, strict=True):
                    total = total + kind(value) * s
                y[t, o] = total * sx[t, 0]
            else:
                y[t, o] = kind(sums[0]) * (sx[t, 0] * scales[0])
            if bias is not None:
                y[t, o] += kind(bias[o].item())
    return y


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_integer_linear_is_exact(granularity: Granularity, dtype: torch.dtype, has_bias: bool) -> None:
    """y equals, bit for bit, sums of Python integers followed by the defined floating-point steps."""
    for tokens, inputs, outputs in [(1, 1, 1), (1, 65, 3), (3, 300, 2), (0, 5, 2)]:
        codes, scale = quant.int8_codes(torch.randn(tokens, inputs, dtype=dtype))
        weight = torch.randn(outputs, inputs, dtype=dtype)
        weight_scale = quant.absmean_scale(weight, granularity)
        weight_codes = quant.ternary_codes(weight, weight_scale, granularity)
        bias = torch.randn(outputs, dtype=dtype) if has_bias else None
        got = quant.integer_linear(codes, scale, weight_codes, weight_scale, bias, granularity)
        expected = python_integer_linear(codes, scale, weight_codes, weight_scale, bias, granularity)
        # y += sums * s may be one fused operation, hence one rounding less per group.
        rounding = len(granules(inputs, granularity)) * torch.finfo(dtype).eps if granularity.startswith("group") else 0.0
        size = max(1.0, np.abs(expected).max(initial=0))
        assert got.dtype == dtype
        assert np.abs(got.numpy() - expected).max(initial=0) <= 4 * rounding * size


def test_integer_linear_is_exact_beyond_fp32() -> None:
    """Sums above 2²⁴ are accumulated where they are exact, then rounded once."""
    inputs = EXACT_IN_FP32 + 5001
    codes = torch.full((1, inputs), 127, dtype=torch.int8)
    codes[0, -1] = 1
    weight_codes = torch.ones(2, inputs, dtype=torch.int8)
    weight_codes[1, ::2] = -1
    one = torch.ones(1, 1)
    sums = [int(np.dot(codes[0].numpy().astype(object), row.numpy().astype(object))) for row in weight_codes]
    assert sums[0] > 2**24
    assert quant.integer_linear(codes, one, weight_codes, one, None, "tensor").tolist() == [
        [float(np.float32(s)) for s in sums]
    ]
    exact = quant.integer_linear(codes, one.double(), weight_codes, one.double(), None, "tensor")
    assert exact.tolist() == [[float(s) for s in sums]]


def test_integer_linear_is_the_linear_of_the_quantised_operands() -> None:
    """In float64 it agrees with F.linear(Q(x), Q(W), b), leading dimensions included."""
    x, bias = torch.randn(2, 3, 300, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    for granularity in GRANULARITIES:
        weight = torch.randn(7, 300, dtype=torch.float64)
        scale = quant.absmean_scale(weight, granularity)
        y = quant.integer_linear(
            *quant.int8_codes(x), quant.ternary_codes(weight, scale, granularity), scale, bias, granularity
        )
        expected = F.linear(quant.int8_quantize(x), quant.ternary_quantize(weight, granularity), bias)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_rms_norm_is_its_formula() -> None:
    """x / sqrt(mean(x²) + eps) · gain, per token, for a vector and a scalar gain; eps counts for small tokens."""
    x = torch.randn(3, 7, dtype=torch.float64)
    x[1] *= 1e-4
    for gain in (torch.randn(7, dtype=torch.float64), torch.tensor([1.7], dtype=torch.float64)):
        for t, row in enumerate(x.tolist()):
            root = math.sqrt(sum(v * v for v in row) / 7 + 1e-6)
            expected = [v / root * g for v, g in zip(row, gain.expand(7).tolist(), strict=True)]
            torch.testing.assert_close(quant.rms_norm(x, gain, 1e-6)[t].tolist(), expected, rtol=1e-12, atol=0)
        got = quant.rms_norm(x.bfloat16(), gain.float(), 1e-6)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, quant.rms_norm(x.bfloat16().float(), gain.float(), 1e-6).bfloat16(), rtol=0, atol=0)


def test_quantisers_leave_their_input_alone() -> None:
    """No quantiser changes its argument or lets a gradient through by itself."""
    weight = torch.randn(3, 70, requires_grad=True)
    before = weight.detach().clone()
    for granularity in GRANULARITIES:
        assert not quant.ternary_quantize(weight, granularity).requires_grad
    assert not quant.int8_quantize(weight).requires_grad
    assert torch.equal(weight, before)


def test_codes_multiply_by_the_reciprocal() -> None:
    """At the threshold codes follow W · (1/s) rounded twice, as transformers does, where W / s would give others."""
    generator = torch.Generator().manual_seed(3)
    scale = (torch.rand(400, 1, generator=generator) + 0.01).float()
    weight = torch.cat([scale / 2 * (1 + steps * 2**-23) for steps in range(-3, 4)], dim=1)
    expected = np.rint(weight.numpy() * (np.float32(1) / scale.numpy()))
    assert np.array_equal(quant.ternary_codes(weight, scale, "row").numpy(), expected)
    assert not np.array_equal(np.rint(weight.numpy() / scale.numpy()), expected)


def test_int8_codes_multiply_by_the_reciprocal_times_127() -> None:
    """At ties codes follow x · (1/absmax · 127), three roundings as in torch, where 127/absmax would give others."""
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(3))
    absmax = x.abs().amax(dim=1, keepdim=True)
    x[:, :1] = absmax
    x[:, 1:33] = (torch.arange(32) + 0.5) * absmax / 127 * torch.where(x[:, 1:33] > 0, 1, -1)
    one, whole = np.float32(1), np.float32(127)
    expected = np.rint(x.numpy() * (one / absmax.numpy() * whole))
    assert np.array_equal(quant.int8_codes(x)[0].numpy(), expected)
    assert not np.array_equal(np.rint(x.numpy() * (whole / absmax.numpy())), expected)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group-64"])
def test_the_dead_zone_is_what_quantises_to_zero(granularity: Granularity) -> None:
    """dead_zone_sum adds the weights whose code is zero, row by row, and only these have a gradient, which is one."""
    weight = torch.randn(5, 130, dtype=torch.float64).requires_grad_()
    codes = quant.ternary_codes(weight, quant.absmean_scale(weight, granularity), granularity)
    found = quant.dead_zone_sum(weight, granularity)
    expected = [sum(w for w, c in zip(row, code, strict=True) if c == 0) for row, code in zip(weight, codes, strict=True)]
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(v) for v in expected]))
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert torch.equal(gradient, (codes == 0).double())


def test_learned_ranges_follow_their_formula() -> None:
    """Values are α · {−2/3, 0, 2/3} with thresholds at α/3; gradients are those of the docstring, entry by entry."""
    weight = torch.tensor([[-2.0, -0.9, -0.34, -0.3, 0.0, 0.32, 0.34, 0.9, 1.1], [0.1] * 9], dtype=torch.float64)
    weight.requires_grad_()
    ranges = torch.tensor([[1.0], [0.2]], dtype=torch.float64, requires_grad=True)
    found = quant.learned_quantize(weight, ranges)
    expected = torch.tensor([[-1, -1, -1, 0, 0, 0, 1, 1, 1], [1] * 9]) * ranges.detach() * (2 / 3)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(2, 9, dtype=torch.float64)
    dweight, dranges = torch.autograd.grad(found, (weight, ranges), upstream)
    for row in range(2):
        total = 0.0
        for column in range(9):
            r = (weight[row, column] / ranges[row, 0]).item()
            code = round(found[row, column].item() / (ranges[row, 0].item() * 2 / 3))
            inside = abs(r) <= 1
            total += upstream[row, column].item() * (code * 2 / 3 - r if inside else (1.0 if r > 0 else -1.0))
            assert dweight[row, column] == (upstream[row, column] if inside else 0.0)
        assert dranges[row, 0].item() == pytest.approx(total / 18**0.5)
    tiny = quant.learned_quantize(weight, torch.zeros(2, 1, dtype=torch.float64))
    assert tiny.isfinite().all(), "a range that learned its way to zero is clamped"
