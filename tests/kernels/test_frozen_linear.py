"""The frozen linear has the same bits on the native kernels and in torch, eager and compiled."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from trilobit import quant
from trilobit.kernels import build, dispatch, frozen_linear, native
from trilobit.nn.packed import PackedLinear
from trilobit.quant import Granularity

GRANULARITIES: list[Granularity] = ["tensor", "row", "group-64", "group-128", "group-256"]
NO_COMPILER = build.find_library() is None and build.compiler() is None
pytestmark = pytest.mark.skipif(NO_COMPILER, reason=f"no native library: {build.why_not()}")


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    build.build()
    native._library.cache_clear()
    assert native.available()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)


def linear(granularity: Granularity = "tensor", outputs: int = 37, inputs: int = 300, bias: bool = True) -> PackedLinear:
    weight = torch.randn(outputs, inputs)
    scale = quant.absmean_scale(weight, granularity)
    codes = quant.ternary_codes(weight, scale, granularity)
    return PackedLinear(codes, scale, torch.randn(outputs) if bias else None, None, granularity, True)


def definition(module: PackedLinear, x: Tensor) -> Tensor:
    codes, scale = quant.int8_codes(x)
    y = quant.integer_linear(codes, scale, module.codes, module.scale, module.bias, module.granularity)
    return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_native_has_the_bits_of_the_definition(granularity: Granularity) -> None:
    """Every granule, with and without bias, one token and several, fp32, bf16 and fp16 inputs: the definition's bits."""
    for bias, batch, dtype in product((True, False), ((1,), (2, 3), ()), (torch.float32, torch.bfloat16, torch.float16)):
        module, x = linear(granularity, bias=bias), torch.randn(*batch, 300).to(dtype)
        assert frozen_linear.frozen_choice("cpu", dtype).name == "native"
        with torch.no_grad():
            y = module(x)
        assert module._packed is not None
        assert y.dtype == dtype
        assert torch.equal(y, definition(module, x).to(dtype))


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_without_the_library_torch_has_the_bits_of_the_definition(
    vnni: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library is missing nothing is packed, and torch computes the same, on int8 instructions or in fp32."""
    monkeypatch.setattr(dispatch, "_has_vnni", lambda: vnni)
    for granularity in GRANULARITIES:
        module, x = linear(granularity), torch.randn(3, 300)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        assert module._packed is None
        expected = definition(module, x)
        grouped = quant.group_size(granularity) is not None
        assert torch.equal(y, expected) or (grouped and torch.allclose(y, expected, rtol=1e-6, atol=1e-4))


def test_float64_is_computed_in_float64() -> None:
    """A float64 input, which the kernels do not take, is computed by torch in float64."""
    module, x = linear(bias=False), torch.randn(2, 300, dtype=torch.float64)
    y = module(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, definition(module, x))


def test_changed_codes_are_packed_again() -> None:
    """Codes changed in place, loaded, or copied with the module are the ones multiplied; unchanged ones are packed once."""
    module, x = linear(), torch.randn(2, 300)
    module(x)
    assert module._packed is not None
    first = module._packed[2]
    module(x)
    assert module._packed[2] is first
    module.codes.neg_()
    assert torch.equal(module(x), definition(module, x))
    other = linear()
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    twin = copy.deepcopy(module)
    twin.codes.neg_()
    assert torch.equal(twin(x), definition(twin, x))
    assert torch.equal(module(x), other(x))
    assert set(module.state_dict()) == {"codes", "scale", "bias"}
    with torch.inference_mode():
        inside = linear()
        assert torch.equal(inside(x), definition(inside, x))


@pytest.mark.parametrize("warm", [True, False])
def test_compiles_as_one_graph(warm: bool) -> None:
    """torch.compile(fullgraph=True) keeps the operators whole and the bits, whether packed before or while tracing."""
    torch.compiler.reset()
    modules = nn.Sequential(linear(), linear("group-64", 20, 37))
    x = torch.randn(4, 300)
    with torch.no_grad():
        expected = copy.deepcopy(modules)(x)
        if warm:
            modules(x)
        compiled = torch.compile(modules, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(x), expected)
    torch.compiler.reset()


def test_operators_are_well_formed() -> None:
    """torch's own checks of schema, fake kernels and dispatch pass."""
    module, x = linear("group-128"), torch.randn(2, 300)
    packed = frozen_linear.pack_codes(module.codes, module.granularity)
    form = frozen_linear.layout(module.granularity)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.trilobit.native_pack.default, (module.codes, 128, form), test_utils=tests)
    arguments = (x, packed, module.scale, None, 37, 128, form)
    torch.library.opcheck(torch.ops.trilobit.native_linear.default, arguments, test_utils=tests)


def test_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names the instruction set; without the library it says what to do about it; other devices are not asked."""
    choice = frozen_linear.frozen_choice("cpu", torch.float32)
    assert choice.name == "native"
    assert native.choice().name in choice.reason
    assert frozen_linear.frozen_choice("mps", torch.float32) == dispatch.int8_choice("mps")
    monkeypatch.setattr(native, "_library", lambda: None)
    monkeypatch.setattr(build, "find_library", lambda: None)
    choice = frozen_linear.frozen_choice("cpu", torch.float32)
    assert choice.name in ("int8", "fp32")
    assert "trilobit.kernels.build" in choice.reason
