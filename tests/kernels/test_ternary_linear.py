"""The fused ternary linear against the composition of quant.py's pieces, its oracle.

Errors are stated against float64 truth and as a multiple of a baseline's: the same operands through plain torch.
"""

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trilobit import quant
from trilobit.kernels.ternary_linear import Rule, Strength, ternary_linear
from trilobit.quant import Granularity

GRANULARITIES: list[Granularity] = ["tensor", "row", "group-64", "group-128", "group-256"]
NORMS = ["vector", "scalar", None]
EPS = 1e-6
INPUTS, OUTPUTS = 300, 11
# torch 2.13's dynamo instantiates autograd.Function itself when it traces one.
NO_WARNING = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
INDUCTOR_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
NAMES = ("x", "weight", "bias", "gain")

Operands = dict[str, Tensor]


def operands(
    dtype: torch.dtype, norm: str | None, shape: tuple[int, ...] = (5, INPUTS), bias: bool = True, **options: Any
) -> Operands:
    inputs = shape[-1]
    made = {"x": torch.randn(shape, **options) * 3 + 0.5, "weight": torch.randn(OUTPUTS, inputs, **options) * 0.1}
    if bias:
        made["bias"] = torch.randn(OUTPUTS, **options)
    if norm is not None:
        made["gain"] = torch.rand(inputs if norm == "vector" else 1, **options) * 2 + 0.2
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def blend(value: float, dtype: torch.dtype) -> Strength:
    return value if value in (0.0, 1.0) else torch.tensor(value, dtype=dtype)


def strengths(dtype: torch.dtype) -> Iterator[tuple[Strength, Strength]]:
    return ((blend(w, dtype), blend(a, dtype)) for w, a in product((0.0, 1.0, 0.3), (0.0, 1.0, 0.7)))


def fused(o: Operands, rule: Rule, weights: Strength, activations: Strength) -> Tensor:
    return ternary_linear(o["x"], o["weight"], o.get("bias"), o.get("gain"), rule, weights, activations)


def composed(o: Operands, rule: Rule, weights: Strength, activations: Strength) -> Tensor:
    """norm → fade(int8) → linear with fade(ternary), every gradient left to autograd."""
    h = quant.rms_norm(o["x"], o["gain"], rule.eps) if "gain" in o else o["x"]
    if rule.int8_activations:
        h = quant.fade(h, quant.int8_quantize(h), activations)
    w = quant.fade(o["weight"], quant.ternary_quantize(o["weight"], rule.granularity), weights)
    return F.linear(h, w, o.get("bias"))


def float64_truth(o: Operands, rule: Rule, weights: Strength, activations: Strength, dy: Tensor) -> Operands:
    """Float64 arithmetic on the operands that fp32 quantisation chose: its codes are the definition."""
    o64 = {name: value.detach().double().requires_grad_() for name, value in o.items()}
    with torch.no_grad():
        h32 = quant.rms_norm(o["x"], o["gain"], rule.eps) if "gain" in o else o["x"].float()
        w32 = o["weight"]
        hq, wq = quant.int8_quantize(h32).double(), quant.ternary_quantize(w32, rule.granularity).double()
    h = quant.rms_norm(o64["x"], o64["gain"], rule.eps) if "gain" in o else o64["x"]
    if rule.int8_activations:
        h = quant.fade(h, hq, as_double(activations))
    y = F.linear(h, quant.fade(o64["weight"], wq, as_double(weights)), o64.get("bias"))
    return gradients(y, o64, dy.double())


def as_double(strength: Strength) -> Strength:
    return strength.double() if isinstance(strength, Tensor) else strength


def gradients(y: Tensor, o: Operands, dy: Tensor) -> Operands:
    names = [name for name in NAMES if name in o]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, [o[name] for name in names], dy), strict=True))}


class Comparison:
    """Holds each result to k × the baseline's error. The gradient of a scalar gain is one number, whose error is luck:
    there the errors of all combinations together are compared."""

    def __init__(self, k: float):
        self.k = k
        self.scalars: list[tuple[float, float, float]] = []

    def add(self, got: Operands, baseline: Operands, truth: Operands, what: object) -> None:
        for name, value in truth.items():
            if value.numel() == 1:
                self.scalars.append((abs((got[name] - value).item()), abs((baseline[name] - value).item()), value.item()))
            else:
                limit = self.k * error(baseline[name], value) + torch.finfo(torch.float32).eps
                assert error(got[name], value) <= limit, (what, name)

    def finish(self) -> None:
        if self.scalars:
            ours, theirs, size = torch.tensor(self.scalars, dtype=torch.float64).norm(dim=0).tolist()
            assert ours <= self.k * theirs + torch.finfo(torch.float32).eps * size


def error(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth).norm().item() / max(truth.norm().item(), 1e-300)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float64_equals_the_composition(granularity: Granularity, norm: str | None) -> None:
    """In float64 output and gradients agree to 1e-10 at every pair of strengths, with int8 activations and without."""
    o = operands(torch.float64, norm)
    for int8, (weights, activations) in product((True, False), strengths(torch.float64)):
        rule = Rule(granularity, int8, EPS)
        y = composed(o, rule, weights, activations)
        dy = torch.randn_like(y)
        expected, got = gradients(y, o, dy), gradients(fused(o, rule, weights, activations), o, dy)
        for name, value in expected.items():
            assert got[name].shape == value.shape
            assert got[name].dtype == value.dtype
            assert (got[name] - value).abs().max() <= 1e-10 * max(1.0, value.abs().max().item()), (
                int8,
                weights,
                activations,
                name,
            )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fp32_is_as_near_to_the_truth_as_the_composition(granularity: Granularity, norm: str | None) -> None:
    """fp32 errors of output and gradients are at most 2 × those of the fp32 composition, plus one rounding."""
    o, comparison = operands(torch.float32, norm), Comparison(2)
    for int8, (weights, activations) in product((True, False), strengths(torch.float32)):
        rule = Rule(granularity, int8, EPS)
        y = composed(o, rule, weights, activations)
        dy = torch.randn_like(y)
        truth = float64_truth(o, rule, weights, activations, dy)
        baseline, got = gradients(y, o, dy), gradients(fused(o, rule, weights, activations), o, dy)
        comparison.add(got, baseline, truth, (int8, weights, activations))
    comparison.finish()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bf16_autocast_is_as_near_to_the_truth_as_a_plain_bf16_linear(granularity: Granularity, norm: str | None) -> None:
    """Under bf16 autocast errors are at most 1.5 × those of a plain bf16 linear on the same dequantised operands."""
    o, comparison = operands(torch.float32, norm, (40, INPUTS)), Comparison(1.5)
    for int8, (weights, activations) in product((True, False), strengths(torch.float32)):
        rule = Rule(granularity, int8, EPS)
        with torch.autocast("cpu", torch.bfloat16):
            baseline_y = composed(o, rule, weights, activations)
            y = fused(o, rule, weights, activations)
        assert y.dtype == baseline_y.dtype == torch.bfloat16
        dy = torch.randn_like(y)
        truth = float64_truth(o, rule, weights, activations, dy)
        baseline, got = gradients(baseline_y, o, dy), gradients(y, o, dy)
        comparison.add(got, baseline, truth, (int8, weights, activations))
    comparison.finish()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fully_quantised_forward_is_integer_linear(granularity: Granularity, norm: str | None) -> None:
    """At λ = 1 the forward has integer_linear's bits; under autocast, these rounded last."""
    for dtype, bias in product((torch.float32, torch.float64), (True, False)):
        o = operands(dtype, norm, (3, 4, 130), bias)
        h = quant.rms_norm(o["x"], o["gain"], EPS) if "gain" in o else o["x"]
        scale = quant.absmean_scale(o["weight"], granularity)
        codes = quant.ternary_codes(o["weight"], scale, granularity)
        expected = quant.integer_linear(*quant.int8_codes(h), codes, scale, o.get("bias"), granularity)
        assert torch.equal(fused(o, Rule(granularity, True, EPS), 1.0, 1.0), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(o, Rule(granularity, True, EPS), 1.0, 1.0), expected.bfloat16())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_strength_zero_without_norm_is_the_plain_linear(bias: bool, dtype: torch.dtype, autocast: bool) -> None:
    """λ = 0 without a norm has F.linear's bits, in every dtype, under autocast too, and its gradients."""
    for shape in [(7, 33), (2, 9, 33), (1, 1, 33), (0, 33), (40, 300)]:
        o = operands(dtype, None, shape, bias)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            got, expected = fused(o, Rule("tensor", True, EPS), 0.0, 0.0), F.linear(o["x"], o["weight"], o.get("bias"))
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        dy = torch.randn_like(got)
        plain, ours = gradients(expected, o, dy), gradients(got, o, dy)
        for name, value in plain.items():
            tolerance = 4 * torch.finfo(expected.dtype).eps
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * max(1.0, dy.numel() ** 0.5))


@pytest.mark.parametrize("norm", NORMS)
def test_layout_of_the_input_does_not_matter(norm: str | None) -> None:
    """Leading dimensions, transposes, slices and expanded inputs give what contiguous rows give, gradient included."""
    rule = Rule("row", True, EPS)
    base = torch.randn(6, 4, 70)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda b: b.transpose(0, 1),
        lambda b: b[:, ::2],
        lambda b: b[..., ::2],
        lambda b: b[:1].expand(3, 4, 70),
    ]
    for layout, (weights, activations) in product(layouts, [(1.0, 1.0), (0.0, 0.0), (torch.tensor(0.4),) * 2]):
        leaf = base.clone().requires_grad_()
        x = layout(leaf)
        o = operands(torch.float32, norm, (1, x.shape[-1]))
        y = fused({**o, "x": x}, rule, weights, activations)
        rows = x.detach().reshape(-1, x.shape[-1]).clone().requires_grad_()
        flat = fused({**o, "x": rows}, rule, weights, activations)
        assert y.shape == (*x.shape[:-1], OUTPUTS)
        torch.testing.assert_close(y.flatten(0, -2), flat)  # a strided matrix takes another path through BLAS
        dy = torch.randn_like(y)
        y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1))  # a gradient that is not contiguous either
        flat.backward(dy.flatten(0, -2))
        assert leaf.grad is not None
        assert rows.grad is not None
        torch.testing.assert_close(leaf.grad, torch.autograd.grad(x, leaf, rows.grad.view(x.shape))[0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, norm: str | None) -> None:
    """No token and one token work forward and backward at every strength; no token gives zero gradients."""
    for granularity, (weights, activations) in product(GRANULARITIES, strengths(torch.float64)):
        o = operands(torch.float64, norm, (2, tokens, 70))
        y, expected = (f(o, Rule(granularity, True, EPS), weights, activations) for f in (fused, composed))
        got, want = gradients(y, o, torch.ones_like(y)), gradients(expected, o, torch.ones_like(y))
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strength", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_only_where_they_are_wanted(norm: str | None, strength: float) -> None:
    """For every subset of operands that require gradients, exactly these get one, and the same as when all do."""
    rule = Rule("tensor", True, EPS)
    o = operands(torch.float32, norm)
    lam = blend(strength, torch.float32)
    dy = torch.randn(5, OUTPUTS)
    full = gradients(fused(o, rule, lam, lam), o, dy)
    for wanted in product((False, True), repeat=len(o)):
        subset = {
            name: value.detach().clone().requires_grad_(want) for (name, value), want in zip(o.items(), wanted, strict=True)
        }
        y = fused(subset, rule, lam, lam)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for name, want in zip(subset, wanted, strict=True):
            gradient = subset[name].grad
            assert (gradient is not None) == want
            assert gradient is None or torch.equal(gradient, full[name])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bad", ["x", "weight", "gain", "bias"])
def test_nan_is_never_turned_into_a_number(bad: str, granularity: Granularity) -> None:
    """A NaN in any operand reaches every output it should reach, at every strength."""
    o = operands(torch.float32, "vector")
    with torch.no_grad():
        o[bad].view(-1)[-1] = torch.nan
    for weights, activations in strengths(torch.float32):
        lost = fused(o, Rule(granularity, True, EPS), weights, activations).isnan()
        if bad == "x":
            assert lost[-1].all()
            assert not lost[:-1].any()
        elif bad == "gain":
            assert lost.all()
        else:
            assert lost[:, -1].all()


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_checkpointing_changes_nothing(norm: str | None) -> None:
    """Recomputing in the backward gives the same bits, with autocast and at a blending strength as well."""
    for (weights, activations), autocast in product(strengths(torch.float32), (False, True)):
        o = operands(torch.float32, norm)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = fused(o, Rule("tensor", True, EPS), weights, activations)
            again = checkpoint(fused, o, Rule("tensor", True, EPS), weights, activations, use_reentrant=False)
        dy = torch.randn_like(y)
        expected, got = gradients(y, o, dy), gradients(again, o, dy)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def kept_bytes(run: Callable[[], Tensor], owned: list[Tensor]) -> int:
    """Bytes of distinct storage kept for the backward, without those of `owned` (parameters live anyway)."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    for tensor in owned:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_keeps_codes_rather_than_values(autocast: bool) -> None:
    """At λ = 1 fewer bytes are kept than by the plain linear; with a norm, fewer than by norm and linear."""
    o = operands(torch.float32, "vector", (512, 256))
    parameters = [o["weight"], o["bias"], o["gain"]]
    without_gain = {name: value for name, value in o.items() if name != "gain"}

    def inside(f: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return f()

        return run

    rule = Rule("tensor", True, EPS)
    plain = kept_bytes(inside(lambda: F.linear(o["x"], o["weight"], o["bias"])), parameters)
    ours = kept_bytes(inside(lambda: fused(without_gain, rule, 1.0, 1.0)), parameters)
    assert ours < (0.6 if autocast else 0.4) * plain, (ours, plain)
    normed = kept_bytes(
        inside(lambda: F.linear(F.rms_norm(o["x"], (256,), o["gain"], EPS), o["weight"], o["bias"])), parameters
    )
    ours = kept_bytes(inside(lambda: fused(o, rule, 1.0, 1.0)), parameters)
    assert ours < 0.9 * normed, (ours, normed)


def compiled_agrees(backend: str, combinations: list[tuple[Granularity, str | None, bool]], tolerance: float) -> None:
    for granularity, norm, autocast in combinations:
        torch.compiler.reset()
        rule = Rule(granularity, True, EPS)
        o = operands(torch.float32, norm, (2, 6, 70))
        step = torch.compile(lambda o, w, a, rule=rule: fused(o, rule, w, a), fullgraph=True, backend=backend)
        for weights, activations in [(1.0, 1.0), (0.0, 0.0), (torch.tensor(0.25), torch.tensor(0.5))]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, got = fused(o, rule, weights, activations), step(o, weights, activations)
            dy = torch.randn_like(y)
            expected, found = gradients(y, o, dy), gradients(got, o, dy)
            for name, value in expected.items():
                assert error(found[name], value.double()) <= tolerance, (granularity, norm, autocast, weights, name)
    torch.compiler.reset()


@NO_WARNING
def test_compiles_as_one_graph() -> None:
    """torch.compile(fullgraph=True) traces forward and backward without a break and gives the same bits."""
    compiled_agrees("aot_eager", [("tensor", "vector", False), ("group-64", None, True)], 0.0)


@pytest.mark.slow
@INDUCTOR_WARNS
@NEEDS_COMPILER
def test_compiles_with_inductor() -> None:
    """Generated code agrees in fp32 but for rounding, for every kind of norm and granule."""
    compiled_agrees("inductor", [("tensor", "vector", False), ("row", "scalar", False)], 2e-6)


@pytest.mark.slow
@INDUCTOR_WARNS
@NEEDS_COMPILER
@pytest.mark.parametrize("inputs", [128, 70, 300])
def test_inductor_spreads_group_scales(inputs: int) -> None:
    """Generated code repeats group scales exactly, short last group included (repeat_interleave read past its end)."""
    scale = quant.absmean_scale(torch.randn(11, inputs), "group-64")
    spread = torch.compile(lambda scale: quant.spread_scale(scale, inputs, "group-64") * 1, fullgraph=True)
    assert torch.equal(spread(scale), quant.spread_scale(scale, inputs, "group-64"))


@pytest.mark.slow
@INDUCTOR_WARNS
@NEEDS_COMPILER
def test_inductor_rounds_group_scales_to_fp16() -> None:
    """Generated code rounds group scales to fp16 as the definition says."""
    weight = torch.randn(11, 128)
    compiled = torch.compile(lambda weight: quant.absmean_scale(weight, "group-64"), fullgraph=True)
    assert torch.equal(compiled(weight), quant.absmean_scale(weight, "group-64"))
