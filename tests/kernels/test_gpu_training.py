"""Training on the Triton kernels: the ternary linear's forward has the definition's bits, gradients are as near to the truth as
torch's, a compiled step is one graph, and weights are quantised once a step."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import families
from trilobit import quant
from trilobit.kernels import gpu
from trilobit.kernels.ternary_linear import Rule, ternary_linear
from trilobit.nn.ternary import TernaryLinear, kept_codes
from trilobit.quant import Granularity
from trilobit.surgery.roles import decoder_layers
from trilobit.surgery.ternary import TernarySpec, ternarize
from trilobit.train.objective import NextToken

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
NO_WARNING = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))


def run(leaves: list[Tensor], rule: Rule, precision: torch.dtype, dy: Tensor) -> list[Tensor]:
    """Output and gradients at λ = 1 of x, weight, bias, gain."""
    x, weight, bias, gain = leaves
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16):
        y = ternary_linear(x, weight, bias, gain, rule, 1.0, 1.0)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("granularity", ["tensor", "row", "group-64"])
def test_ternary_linear_on_the_kernels(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is quant.integer_linear's of the codes; gradients lie within 1.5 × the distance of torch's from float64."""
    rule = Rule(granularity, True, EPS)
    for precision, scalar in product((torch.float32, torch.bfloat16), (True, False)):
        x, dy = torch.randn(2, 9, 150) * 3, torch.randn(2, 9, 21)
        made = x, torch.randn(21, 150) * 0.1, torch.randn(21), torch.rand(1 if scalar else 150) + 0.5
        leaves = [t.to(DEVICE).requires_grad_() for t in made]
        found = run(leaves, rule, precision, dy.to(DEVICE))
        codes, scale, _ = gpu.norm_quantize(leaves[0].detach().flatten(0, 1), leaves[3].detach(), EPS)
        weight_scale = quant.absmean_scale(leaves[1], granularity)
        weight_codes = quant.ternary_codes(leaves[1], weight_scale, granularity)
        expected = quant.integer_linear(codes, scale, weight_codes, weight_scale, leaves[2].detach(), granularity)
        assert torch.equal(found[0], expected.view(2, 9, 21).to(precision))
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "DEVICES", ())
            baseline = run(leaves, rule, precision, dy.to(DEVICE))
            truth = run([t.detach().double().requires_grad_() for t in leaves], rule, torch.float64, dy.to(DEVICE).double())
        for ours, theirs, exact in zip(found[1:], baseline[1:], truth[1:], strict=True):
            if exact.numel() > 1:  # the gradient of a scalar gain is one number, whose error is luck
                error, limit = ((g.double() - exact).norm().item() for g in (ours, theirs))
                assert error <= 1.5 * limit + 1e-6 * exact.norm().item()


class Attention(nn.Module):
    """Three linears that read one input, as q, k and v do."""

    def __init__(self, norm: str | None):
        super().__init__()
        self.parts = nn.ModuleList(TernaryLinear(48, 20, False, norm=norm, device=DEVICE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (part(x) for part in self.parts)
        return first * second + third


@NO_WARNING
@pytest.mark.parametrize("norm", [None, "vector"])
def test_a_compiled_step_is_one_graph_and_quantises_a_shared_input_once(norm: str | None) -> None:
    """torch.compile(fullgraph=True) takes forward and backward; three linears without norms of their own quantise their input
    once, with norms three times; the numbers are those of the eager step."""
    calls: list[str] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.extend(str(node.target).split(".")[1] for node in graph.graph.nodes if "trilobit" in str(node.target))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    model, x = Attention(norm), torch.randn(5, 48, device=DEVICE)
    parameters = list(model.parameters())
    y = model(x)
    expected = [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]
    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    y = torch.compile(model, fullgraph=True, backend=backend)(x)
    got = [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert calls.count("norm_quantize") == (1 if norm is None else 3)
    assert calls.count("int8_linear") == calls.count("ternarize") == 3
    assert calls.count("norm_backward") == (0 if norm is None else 3)
    torch.compiler.reset()


@NO_WARNING
@pytest.mark.parametrize("compiled", [True, False])
def test_kept_codes_are_made_once_and_change_nothing(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside kept_codes the weight is quantised once for all micro-batches, output and gradients are those of outside, and
    afterwards changed weights count again."""
    torch.compiler.reset()
    made: list[int] = []
    ternarize = gpu.ternarize
    monkeypatch.setattr(gpu, "ternarize", lambda *a: made.append(1) or ternarize(*a))
    layer = TernaryLinear(48, 20, device=DEVICE)
    layer.compile(fullgraph=True, backend="aot_eager") if compiled else None
    x = torch.randn(5, 48, device=DEVICE)
    parameters = list(layer.parameters())

    def step() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]

    outside = step()
    made.clear()
    with kept_codes(layer):
        inside = [step() for _ in range(2)]
    assert not made
    assert layer.kept is None
    for found in inside:
        for ours, theirs in zip(found, outside, strict=True):
            assert torch.equal(ours, theirs)
    with torch.no_grad():
        layer.weight.neg_()
    assert not torch.equal(step()[0], outside[0])
    layer.set_strength(0.5, 1.0)
    with kept_codes(layer):
        assert layer.kept is None
    torch.compiler.reset()


@NO_WARNING
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own look
def test_a_whole_step_breaks_no_graph() -> None:
    """Decoder layers of a real architecture, every projection ternary, compile as one graph each, forward and backward, with
    codes kept and not; loss and gradients are the eager step's."""
    torch.compiler.reset()
    model = families.build("llama", num_hidden_layers=1).to(DEVICE).train()
    ternarize(model, TernarySpec(placement="every"))
    windows = families.tokens(1, 5).to(DEVICE)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> list[Tensor]:
        loss = NextToken(model)(windows).total
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    expected = step()
    for _, layer in decoder_layers(model):
        layer.compile(fullgraph=True, backend="aot_eager")
    found = [step()]
    with kept_codes(model):
        found.append(step())
    for results in found:
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
