"""A frozen ternary model compiled for the engine is the model that transformers runs, rounded where the engine rounds."""

from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import build, tokens
from infer.natives import POSITIONS, as_the_engine_rounds, frozen
from trilobit.infer import compiler
from trilobit.infer.compiler import NotNative
from trilobit.infer.engine import Engine
from trilobit.infer.graph import Graph
from trilobit.infer.stored import freeze
from trilobit.kernels import build as kernels
from trilobit.kernels import native
from trilobit.quant import Granularity
from trilobit.surgery.outlier_safe import outlier_safe
from trilobit.surgery.ternary import Activations, Cover, Gain, Placement, TernarySpec, ternarize

NO_COMPILER = kernels.find_library() is None and kernels.compiler() is None
pytestmark = pytest.mark.skipif(NO_COMPILER, reason=f"no native library: {kernels.why_not()}")

ROUNDING = 2e-6  # of the logits, where no int8 code moved: half the positions at least
MOVED = 0.25  # of what the engine's own rounding changes: the mean, codes that moved included


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if kernels.find_library() is None:
        kernels.build()
    native._library.cache_clear()
    assert native.available()


@torch.no_grad()
def errors(engine: list[Tensor], model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Relative distance of the logits of every position."""
    parts = []
    for y, row in zip(engine, ids, strict=True):
        expected = model(input_ids=row[None], use_cache=False).logits[0]
        parts.append((y - expected).norm(dim=-1) / expected.norm(dim=-1))
    return torch.cat(parts)


def require_same(model: PreTrainedModel, what: Any = None, length: int = 60, rounds: bool = True, **options: Any) -> Graph:
    """The engine agrees with the model: with its rounding to the last bits, but for codes that moved."""
    compiled = compiler.compile(model, **options)
    engine, ids = Engine(compiled, None, []), tokens(3, length)
    found = [engine.logits(row) for row in ids]
    exact = errors(found, model, ids).mean()
    with as_the_engine_rounds(model):
        off = errors(found, model, ids)
    assert off.median() <= ROUNDING, (what, off)
    assert off.mean() <= MOVED * exact if rounds else off.mean() <= 0.005, (what, off.mean(), exact)
    return compiled


SURGERIES: list[tuple[Placement, Gain]] = [
    ("every", "vector"), ("every", "scalar"), ("output", "vector"), ("output", "scalar"), ("none", "vector"),
]  # fmt: skip


@pytest.mark.parametrize("scale", get_args(Granularity))
@pytest.mark.parametrize(("placement", "gain"), SURGERIES)
def test_everything_that_ternarize_offers(placement: Placement, gain: Gain, scale: Granularity) -> None:
    """Norms everywhere, at outputs or nowhere, vector and scalar gains, every granule, every cover, tied or not, int8 and
    full-precision activations: all are native, and the engine computes them."""
    for activations, cover, tied in product(get_args(Activations), get_args(Cover), (False, True)):
        spec: dict[str, Any] = {
            "placement": placement,
            "gain": gain,
            "scale": scale,
            "activations": activations,
            "cover": cover,
        }
        model = frozen("llama", tied=tied, settings={"intermediate_size": 150}, **spec)
        compiled = require_same(model, (activations, cover, tied), length=20, rounds=False)
        header = compiled.header
        assert header.ternary_head == (cover != "projections")
        assert header.ternary_embedding == (cover == "+embeddings" or (tied and cover == "+lm_head"))
        assert header.activations == ("token" if activations == "int8" else "group")


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a head size of its own": ("llama", {"head_dim": 10}),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window in one layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2 without the window that it names": ("qwen2", {"use_sliding_window": False, "sliding_window": 5}),
    "qwen3": ("qwen3", {}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3 with a window": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "bitnet": ("bitnet", {"hidden_act": "relu2"}),
    "bitnet with silu": ("bitnet", {"hidden_act": "silu"}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_families(case: str) -> None:
    """Each native family, with its own parts (biases, windows, layers without positions, q/k norms, norms before outputs),
    tied and untied, in both layouts and with int8 heads."""
    family, settings = FAMILIES[case]
    specs: list[dict[str, Any]] = [{"placement": "none"}]
    if family != "bitnet":
        specs += [{"scale": "row"}, {"placement": "output", "gain": "scalar", "scale": "group-64", "activations": "none"}]
    for spec, tied in product(specs, (False, True)):
        model = frozen(family, tied=tied, settings=settings, **spec)
        for form in ("two-bit", "base-3"):
            compiled = require_same(model, (spec, tied, form), form=form)
            assert compiled.header.layout == form
    windowed = case.endswith(("a window", "a window in one layer"))
    assert (max(compiled.header.windows) in (5, 7)) == windowed
    assert case != "smollm3" or compiled.header.rotary == [True, False]


ROPES: dict[str, dict[str, Any]] = {
    "another base": {"rope_type": "default", "rope_theta": 500.0},
    "a factor that Llama ignores": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_positions(rope: str) -> None:
    """Angles and their factor are the model's own, whatever rule made them."""
    model = frozen("llama", settings={"rope_parameters": ROPES[rope], "head_dim": 16})
    compiled = require_same(model, rope, length=120)
    assert (compiled.header.rotary_scale != 1) == (rope == "yarn")


def test_what_was_trained_without_outliers_is_native() -> None:
    """A model with single-scale norms compiles; embedding projections that are not folded are refused (old code: they were
    left out, and the engine ran another model)."""
    for projected in (False, True):
        model = AutoModelForCausalLM.from_config(build("llama", max_position_embeddings=POSITIONS).config)  # gains are ones
        outlier_safe(model, embproj=projected)
        ternarize(model)
        if not projected:
            require_same(freeze(model).eval())
        else:
            with pytest.raises(NotNative, match="no ProjectedEmbedding: fold the model first"):
                compiler.compile(freeze(model).eval())


REFUSED: dict[str, tuple[Any, str]] = {
    "gemma3": (lambda: frozen("gemma3_text", placement="none"), "no graph for Gemma3ForCausalLM .it has Llama, Mistral, Qwen2"),
    "phi3": (lambda: frozen("phi3", placement="none"), "no graph for Phi3ForCausalLM"),
    "olmo2": (lambda: frozen("olmo2", placement="none"), "no graph for Olmo2ForCausalLM"),
    "dynamic positions": (
        lambda: frozen(
            "llama", settings={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
        ),
        "no dynamic positions, whose angles depend on the length of the text",
    ),
    "gelu": (lambda: frozen("llama", settings={"hidden_act": "gelu"}), "no gelu gate"),
    "full precision": (lambda: build("llama"), "its projections are not ternary: the engine runs ternary models only"),
    "trainable": (lambda: _ternarized("llama"), "its projections are not ternary"),
    "some projections": (lambda: _with_dense("mlp.up_proj"), "layers.0.up is not ternary, other projections are"),
    "the first not": (lambda: _with_dense("self_attn.q_proj"), "its projections are not ternary"),
    "two rules": (lambda: _mixed(), "layers.1.q is quantised in another way than layers.0.q"),
    "two epsilons": (lambda: _two_epsilons(), "norms have different epsilons"),
    "two norms before one": (
        lambda: frozen("bitnet", settings={"hidden_act": "relu2"}, placement="output"), "o_proj reads two norms"
    ),
}  # fmt: skip


def _ternarized(family: str) -> PreTrainedModel:
    model = build(family)
    ternarize(model)
    return model


def _with_dense(path: str) -> PreTrainedModel:
    model, plain = frozen("llama"), build("llama")
    model.model.layers[0].set_submodule(path, plain.model.layers[0].get_submodule(path))
    return model


def _mixed() -> PreTrainedModel:
    model, other = frozen("llama"), frozen("llama", activations="none")
    model.model.layers[1] = other.model.layers[1]
    return model


def _two_epsilons() -> PreTrainedModel:
    model = frozen("llama")
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_native_is_refused_with_its_reason(what: str) -> None:
    """Other families, positions that depend on the text's length, other gates, models that are not ternary or only in part,
    and what the engine's graph cannot say: NotNative, with the reason."""
    make, says = REFUSED[what]
    with pytest.raises(NotNative, match=says):
        compiler.compile(make())


def test_a_head_in_groups_loses_half_a_step_at_most() -> None:
    """Whatever its size, every weight of an int8 head is within half a step of its group, and a step is fp16's absmax / 127 or
    the number above; what fp16 has no scale for is refused."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (torch.rand(50, 1, generator=generator) * 12 - 9)
    weight = torch.randn(50, 70, generator=generator) * size
    weight[3, 32:64] = 0
    stored = compiler.int8_matrix("head", weight, 32)
    scales = stored["head.scales"]
    assert scales.dtype == torch.float16 and scales.shape == (3, 50)
    codes = native.unpack(native.PackedMatrix(stored["head.codes"], 50, 70, 32, "int8"))
    step = scales.float().T.repeat_interleave(32, dim=1)[:, :70]
    assert ((codes * step - weight).abs() <= 0.5001 * step).all()
    absmax = torch.nn.functional.pad(weight, (0, 26)).view(50, 3, 32).abs().amax(2).T
    assert (scales.float() <= absmax / 127 * (1 + 2.0**-10) + 2.0**-24).all()
    for bad in (1e7, torch.inf, torch.nan):
        weight[7, 7] = bad
        with pytest.raises(NotNative, match="fp16 holds no scale"):
            compiler.int8_matrix("head", weight, 32)


def test_a_subclass_is_another_model() -> None:
    """A model that inherits from a native one may compute anything: it is refused by its type."""
    model = frozen("llama")
    model.__class__ = type("CleverForCausalLM", (type(model),), {})
    with pytest.raises(NotNative, match="no graph for CleverForCausalLM"):
        compiler.compile(model)


def test_a_spec_of_other_peoples_quantisers_is_native_too() -> None:
    """A dead zone's bias and learned ranges are only biases and scales once frozen."""
    require_same(frozen("llama", dead_zone_bias=1e-3))
    require_same(frozen("llama", scale="row", learned_ranges=True))
    assert TernarySpec().dead_zone_bias == 0
