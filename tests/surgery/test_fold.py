"""fold gives the stock model of the same function, which stock transformers writes and reads."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from families import FAMILIES, build, logits, tokens
from surgery.fresh import difference, fresh, train_away
from trilobit.errors import ModelError
from trilobit.infer.stored import freeze
from trilobit.nn.outlier_safe import EmbeddingProjection, SingleScaleRMSNorm
from trilobit.nn.ternary import TernaryLinear
from trilobit.surgery.fold import fold
from trilobit.surgery.outlier_safe import ADDED, outlier_safe
from trilobit.surgery.ternary import TernarySpec, set_strengths, ternarize

IDS = tokens()


def trained(family: str, *, tied: bool = False, ssnorm: bool = True, embproj: bool = True) -> PreTrainedModel:
    model = fresh(family, tied=tied)
    outlier_safe(model, ssnorm=ssnorm, embproj=embproj)
    return train_away(model)


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_model_is_the_same_function(family: str, tied: bool, parts: tuple[bool, bool], tmp_path: Path) -> None:
    """Scales of either sign and projections of any kind fold to 1e-5 of the logits, also through a stock checkpoint."""
    model = trained(family, tied=tied, ssnorm=parts[0], embproj=parts[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    expected = logits(model, IDS)
    stock = fold(model)
    assert difference(logits(stock, IDS), expected) <= 1e-5
    assert not any(isinstance(module, tuple(ADDED)) for module in stock.modules())
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    shapes = {name: (p.shape, p.dtype) for name, p in plain.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in stock.named_parameters()} == shapes
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == (tied and not parts[1])

    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    read, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(read) is type(model)
    assert torch.equal(logits(read, IDS), logits(stock, IDS))

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_folding_is_computed_in_float64(family: str) -> None:
    """Each folded tensor is its float64 value rounded once; a repeated scale is s, or s − 1 where the family adds one."""
    model = trained(family)
    stock = fold(model)
    embedding, head = model.model.embed_tokens, model.lm_head
    exact = embedding.weight.double() @ embedding.projection.weight.double().T
    assert torch.equal(stock.model.embed_tokens.weight, exact.float())
    exact = head.weight.double() @ head.projection.weight.double()
    assert torch.equal(stock.lm_head.weight, exact.float())
    scales = {n: m.weight.double() for n, m in model.named_modules() if isinstance(m, SingleScaleRMSNorm)}
    assert scales
    for name, scale in scales.items():
        gain = (scale - float(family == "gemma3_text")).float()
        weight = stock.get_parameter(f"{name}.weight")
        assert weight.numel() > 1
        assert (weight == gain).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_plain_model_comes_back_equal(family: str, tied: bool) -> None:
    """Without outlier-safe parts the copy has the same parameters and logits, bit for bit, and shares none of them."""
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied
        )  # fmt: skip
        model = GPT2LMHeadModel(config).eval()
    else:
        model = build(family, tied=tied)
    stock = fold(model)
    assert stock is not model
    theirs = dict(stock.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        assert parameter.data_ptr() != theirs[name].data_ptr()
    assert torch.equal(logits(stock, IDS), logits(model, IDS))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_copied(family: str) -> None:
    """Parameters of modules that are neither norm nor end of the model, experts and sinks, arrive by name."""
    model = fresh(family, num_local_experts=2, num_experts_per_tok=2, head_dim=8)
    outlier_safe(model)
    train_away(model)
    assert difference(logits(fold(model), IDS), logits(model, IDS)) <= 1e-5


def test_persistent_buffers_are_copied() -> None:
    """A router's correction bias, a buffer that checkpoints hold, arrives by name."""
    model = fresh(
        "glm4_moe", head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1
    )  # fmt: skip
    kept = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    assert kept
    for buffer in kept.values():
        buffer.copy_(torch.rand_like(buffer))
    outlier_safe(model)
    stock = fold(model)
    assert all(torch.equal(stock.get_buffer(name), buffer) for name, buffer in kept.items())
    assert difference(logits(stock, IDS), logits(model, IDS)) <= 1e-5


def test_modes_and_generation_settings_are_copied() -> None:
    """The generation configuration and the training mode are the model's; a foreign buffer is refused; random state is kept."""
    model = trained("llama").train()
    model.generation_config.max_new_tokens = 3
    model.register_buffer("extra", torch.ones(2))
    with pytest.raises(ModelError, match="not the stock model with outlier-safe parts: the stock model has no extra"):
        fold(model)
    del model.extra
    random = torch.get_rng_state()
    stock = fold(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert stock.training
    assert stock.generation_config.max_new_tokens == 3
    assert stock.generation_config is not model.generation_config
    assert stock.config is not model.config
    model.eval()
    assert torch.equal(fold(model).generate(IDS, do_sample=False), model.generate(IDS, do_sample=False))


def test_masks_mean_the_same() -> None:
    """With left padding and its mask the folded model has the logits of the unfolded one."""
    model = trained("qwen2")
    stock = fold(model)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got, expected = (m(input_ids=IDS, attention_mask=mask, position_ids=positions).logits for m in (stock, model))
    assert difference(got[0], expected[0]) <= 1e-5
    assert difference(got[1, 4:], expected[1, 4:]) <= 1e-5


def test_a_cast_model_keeps_its_scale() -> None:
    """A Gemma that was cast to bf16 multiplies rows by √D in bf16; its folded fp32 twin does the same by its weights."""
    model = fresh("gemma3_text", hidden_size=40).bfloat16()
    outlier_safe(model)
    scale = model.model.embed_tokens.scale
    assert scale != 40**0.5
    stock = fold(model)
    rows = model.model.embed_tokens.folded() * scale
    assert torch.allclose(stock.model.embed_tokens(IDS).double(), rows[IDS], rtol=1e-6)


def _ternary(frozen: bool) -> PreTrainedModel:
    model = trained("llama")
    ternarize(model)
    return freeze(model) if frozen else model


def _foreign(model: PreTrainedModel, path: str, module: nn.Module) -> PreTrainedModel:
    model.set_submodule(path, module)
    return model


def _other_class() -> PreTrainedModel:
    model = trained("llama")
    model.config = AutoConfig.for_model(**{**model.config.to_dict(), "model_type": "mistral"})
    return model


BAD = {
    "ternary": (lambda: _ternary(False), r"has ternary modules \(model\.layers\.0\.self_attn\.q_proj\): fold before"),
    "packed": (lambda: _ternary(True), r"has ternary modules \(model\.layers\.0\.self_attn\.q_proj\): fold before"),
    "no causal model": (lambda: trained("llama").model, "the config of this LlamaModel builds a LlamaForCausalLM"),
    "another class": (_other_class, "the config of this LlamaForCausalLM builds a MistralForCausalLM"),
    "a stray projection": (
        lambda: _foreign(trained("llama"), "model.layers.0.mlp.act_fn", EmbeddingProjection(48)),
        r"the stock model has no model\.layers\.0\.mlp\.act_fn\.weight",
    ),
    "a missing part": (
        lambda: _foreign(trained("llama"), "model.layers.1.self_attn.o_proj", nn.Identity()),
        r"only the stock model has model\.layers\.1\.self_attn\.o_proj\.weight",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_refusals_say_why(kind: str) -> None:
    """What cannot become the stock model is refused, naming the module or the parameter."""
    make, reason = BAD[kind]
    with pytest.raises(ModelError, match=reason):
        fold(make())


@pytest.mark.parametrize("strengths", [0.0, 0.5, 1.0])
def test_where_the_papers_meet(strengths: float) -> None:
    """With single-scale norms, norms inserted at q/k/v/gate/up are factors: a model without them has the same logits.

    The block norm takes scale 1 and eps ε₁ε₂/(s² + ε₂), each linear's output the factor g·s/√(s² + ε₂); in float64 that is
    exact, so the whole model agrees to 1e-9 although int8 rounding would show any other change.
    """
    model = fresh("llama")
    outlier_safe(model)
    train_away(model)
    spec = TernarySpec(gain="scalar", scale="row")
    plan = ternarize(model, spec).plan
    model.double()
    set_strengths(model, [strengths] * 3, [strengths] * 3)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            assert module.rms_norm is not None
            nn.init.uniform_(module.rms_norm.weight, 0.2, 2.0, generator=generator)
    expected = logits(model, IDS)
    folded = 0
    merged: dict[str, tuple[float, float]] = {}
    for path, planned in plan.linears.items():
        linear = model.get_submodule(path)
        if planned.fed_by is None:
            continue
        block = model.get_submodule(planned.fed_by)
        assert isinstance(linear, TernaryLinear) and isinstance(block, SingleScaleRMSNorm) and linear.rms_norm is not None
        s, first = merged.setdefault(planned.fed_by, (block.weight.item(), block.eps))
        root = (s * s + spec.eps) ** 0.5
        factor = linear.rms_norm.weight.item() * s / root
        linear.rms_norm = None
        linear.register_forward_hook(lambda _, inputs, output, factor=factor: output * factor)
        nn.init.ones_(block.weight)
        block.eps = first * spec.eps / root**2
        folded += 1
    assert (folded, len(merged)) == (15, 6)
    assert difference(logits(model, IDS), expected) <= 1e-9
