"""What outlier_safe makes of a model: which modules, which parameters, the same function; and what it refuses."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from families import COMMON, FAMILIES, LAYERS, REFUSED, SCALED_EMBEDDING, build, logits, tokens
from surgery.fresh import difference, fresh, train_away
from trilobit.errors import ConfigError, ModelError
from trilobit.nn.outlier_safe import EmbeddingProjection, ProjectedEmbedding, ProjectedLinear, SingleScaleRMSNorm
from trilobit.surgery.outlier_safe import ADDED, OutlierSafeSpec, apply_spec, find_norms, outlier_safe
from trilobit.surgery.roles import find_roles
from trilobit.surgery.ternary import ternarize

IDS = tokens()
ROUNDING = 4e-6  # of fp32, through three layers
WIDTH = COMMON["hidden_size"]
NORMS_PER_LAYER = {"qwen3": 4, "olmo2": 4, "gemma3_text": 6}


def snapshot(model: PreTrainedModel) -> tuple:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()


def is_as_it_was(model: PreTrainedModel, before: tuple) -> bool:
    (modules, state, config), (modules_before, state_before, config_before) = snapshot(model), before
    names = state.keys() == state_before.keys()
    same = names and all(torch.equal(v.nan_to_num(7.0), state_before[n].nan_to_num(7.0)) for n, v in state.items())
    return same and modules == modules_before and config == config_before


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tied: bool, parts: tuple[bool, bool]) -> None:
    """Every norm has one scale, both projections are in, the table adds up, and no logit moves by more than rounding."""
    ssnorm, embproj = parts
    model = fresh(family, tied=tied)
    expected, eps = logits(model, IDS), model.config.rms_norm_eps
    others = {n for n, p in model.named_parameters() if "norm" not in n and p.ndim == 2}
    norms = [n for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith("bias")]
    surgery = outlier_safe(model, ssnorm=ssnorm, embproj=embproj)
    assert difference(logits(model, IDS), expected) <= (ROUNDING if any(parts) else 0)

    singles = [module for module in model.modules() if isinstance(module, SingleScaleRMSNorm)]
    assert len(singles) == ssnorm * (NORMS_PER_LAYER.get(family, 2) * LAYERS + 1) == ssnorm * len(norms)
    assert all(module.weight.tolist() == [1.0] and module.eps == eps for module in singles)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, ProjectedEmbedding) == isinstance(head, ProjectedLinear) == embproj
    assert (head.weight is embedding.weight) == (tied and not embproj) == model.config.tie_word_embeddings
    projections = {"model.embed_tokens.projection.weight", "lm_head.projection.weight"} if embproj else set()
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2}
    assert matrices == others | projections | ({"lm_head.weight"} if embproj or not tied else set())

    total = sum(p.numel() for p in model.parameters())
    assert sum(row.parameters for row in surgery.rows) == surgery.parameters == total
    rows = {(row.what, row.became): (row.modules, row.parameters) for row in surgery.rows}
    assert rows.get(("RMSNorm", "one scale"), (0, 0)) == (len(singles), len(singles))
    assert rows.get(("embedding projection", "orthogonal at the start"), (0, 0)) == (2 * embproj, 2 * embproj * WIDTH**2)
    assert rows["embedding", "projected" if embproj else "kept"] == (1, embedding.weight.numel())
    assert surgery.spec == OutlierSafeSpec(ssnorm, embproj)
    assert f"{total:,}" in str(surgery)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "apertus", "granite"])
def test_other_decoders(family: str) -> None:
    """Experts, sinks, learned activations and multipliers are left alone: the surgery needs nothing from them."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    options = {"mixtral": {"num_local_experts": 2}, "qwen3_moe": experts, "gpt_oss": {**experts, "num_local_experts": 4}}
    model = fresh(family, **options.get(family, {}))
    expected = logits(model, IDS)
    outlier_safe(model)
    assert difference(logits(model, IDS), expected) <= ROUNDING
    with pytest.raises(ModelError, match="has no RMSNorm"):
        find_norms(model)


def test_layernorm_models_can_have_projections() -> None:
    """Without single-scale norms a model with LayerNorms and a tied head gets its projections, and keeps its function."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)).eval()
    expected = logits(model, IDS)
    outlier_safe(model, ssnorm=False)
    assert difference(logits(model, IDS), expected) <= ROUNDING
    assert not model.config.tie_word_embeddings


def test_a_shared_norm_stays_shared() -> None:
    """A norm that stands in two layers becomes one single-scale norm that stands in both."""
    model = fresh("llama")
    first, last = model.model.layers[0], model.model.layers[2]
    last.input_layernorm = first.input_layernorm
    expected = logits(model, IDS)
    outlier_safe(model)
    assert isinstance(first.input_layernorm, SingleScaleRMSNorm)
    assert last.input_layernorm is first.input_layernorm
    assert difference(logits(model, IDS), expected) <= ROUNDING


@pytest.mark.parametrize("family", ["llama", *SCALED_EMBEDDING])
def test_padding_may_be_any_token(family: str) -> None:
    """The padding token, here the last of the vocabulary, keeps its zero row and its place."""
    model = fresh(family, pad_token_id=96)
    outlier_safe(model)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 96
    assert not embedding(torch.tensor([96])).any()


class Scaled(nn.Module):
    """An RMSNorm that no name gives away, with numbers that are not its eps, and the mistakes that one could make."""

    def __init__(self, width: int, offset: float = 0.0, shift: float = 0.0, power: float = 1.0):
        super().__init__()
        self.alpha, self.delta, self.offset, self.shift, self.power = 0.5, 3e-4, offset, shift, power
        self.theta = nn.Parameter(torch.ones(width) - offset)

    def forward(self, whatever: torch.Tensor) -> torch.Tensor:
        root = (whatever.pow(2).mean(-1, keepdim=True) + self.delta).sqrt()
        return (self.theta + self.offset) * (whatever / root).sign() * (whatever / root).abs() ** self.power + self.shift


def with_norm(make: Callable[[], nn.Module]) -> PreTrainedModel:
    model = fresh("llama")
    model.model.layers[1].input_layernorm = make()
    return model


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_found_by_what_they_compute(offset: float) -> None:
    """A norm with foreign names, w or 1 + w, is found, with the eps that it uses among its numbers."""
    model = with_norm(lambda: Scaled(WIDTH, offset))
    expected = logits(model, IDS)
    rule = find_norms(model)["model.layers.1.input_layernorm"]
    assert (rule.parameter, rule.offset, rule.eps) == ("theta", offset, 3e-4)
    outlier_safe(model)
    assert model.model.layers[1].input_layernorm.eps == 3e-4
    assert difference(logits(model, IDS), expected) <= ROUNDING


class Gated(Scaled):
    def forward(self, whatever: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(whatever)


class HeadsNorm(Scaled):
    def __init__(self, width: int):
        super().__init__(width)
        self.theta = nn.Parameter(torch.ones(4, width // 4))


FOREIGN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layernorm": (lambda: nn.LayerNorm(WIDTH), r"LayerNorm with weight \(32,\) and bias \(32,\)"),
    "centred": (lambda: nn.LayerNorm(WIDTH, bias=False), r"is a LayerNorm with weight \(32,\)"),
    "shifted": (lambda: Scaled(WIDTH, shift=1e-3), "is a Scaled with theta"),
    "bent": (lambda: Scaled(WIDTH, power=1.01), "is a Scaled with theta"),
    "half": (lambda: Scaled(WIDTH, offset=0.5), "is a Scaled with theta"),
    "gated": (lambda: Gated(WIDTH), "is a Gated with theta"),
    "a gain for each head": (lambda: HeadsNorm(WIDTH), r"is a HeadsNorm with theta \(4, 8\)"),
    "no eps of its own": (lambda: nn.RMSNorm(WIDTH), "is a RMSNorm with weight"),
    "other shapes": (lambda: nn.BatchNorm3d(WIDTH, track_running_stats=False), "BatchNorm3d with weight"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_norms_are_refused(kind: str) -> None:
    """Whatever looks like a norm and does not compute an RMSNorm of one input is named, with its parameters."""
    make, reason = FOREIGN[kind]
    with pytest.raises(ModelError, match=rf"model\.layers\.1\.input_layernorm is a .*{reason.removeprefix('is a ')}"):
        find_norms(with_norm(make))


def _scaled_embedding(model: PreTrainedModel) -> PreTrainedModel:
    class Positioned(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + torch.arange(32.0)

    model.model.embed_tokens = Positioned(97, 32)
    return model


def _other_head() -> PreTrainedModel:
    class Head(nn.Linear):
        pass

    model = fresh("llama")
    model.lm_head = Head(32, 97, bias=False)
    return model


def _damaged() -> PreTrainedModel:
    model = fresh("llama")
    nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, float("nan"))
    return model


def _done(surgery: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
    model = fresh("llama")
    surgery(model)
    return model


BAD: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "learned gains": (lambda: build("llama"), r"input_layernorm has learned a gain per channel \(-0\.05\d+ to 1\.69\)"),
    "LayerNorm": (REFUSED["falcon"][0], "input_layernorm is a LayerNorm with weight"),
    "CohereLayerNorm": (lambda: fresh("cohere"), "is a CohereLayerNorm with weight"),
    "no norm with a gain": (
        lambda: fresh("olmo"),
        r"OlmoForCausalLM has no RMSNorm .* its norms are OlmoLayerNorm\. .*--no-ssnorm",
    ),
    "encoder": (REFUSED["bert"][0], "not causal"),
    "encoder with RMSNorms": (lambda: EuroBertForMaskedLM(EuroBertConfig(**COMMON, mask_token_id=3)).eval(), "not causal"),
    "barely an encoder": (
        lambda: fresh("gemma3_text", use_bidirectional_attention=True, initializer_range=0.005),
        "not causal",
    ),
    "encoder and decoder": (REFUSED["t5"][0], "not a decoder-only text model"),
    "no head": (REFUSED["no-head"][0], "has no linear language-model head .its head is a NoneType"),
    "another head": (_other_head, "has no linear language-model head .its head is a Head"),
    "another embedding": (lambda: _scaled_embedding(fresh("llama")), "Positioned, which does more than scale"),
    "damaged": (_damaged, r"not finite, first in what model\.layers\.0 passes on"),
    "quantised": (REFUSED["quantized"][0], "is a quantised checkpoint"),
    "ternary": (lambda: _done(ternarize), "has a TernaryLinear already"),
    "twice": (lambda: _done(outlier_safe), "has a ProjectedEmbedding already"),
    "twice, norms alone": (lambda: _done(lambda m: outlier_safe(m, embproj=False)), "has a SingleScaleRMSNorm already"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refusals_say_why_and_change_nothing(kind: str) -> None:
    """A model that is not understood, or would lose what it learned, is refused with the reason and stays whole."""
    make, reason = BAD[kind]
    model = make()
    before = snapshot(model)
    with pytest.raises(ModelError, match=reason):
        outlier_safe(model)
    assert is_as_it_was(model, before)


def test_tied_heads() -> None:
    """tied=True is refused with projections and for a head of its own; tied=False unties without projections."""
    model = fresh("llama", tied=True)
    with pytest.raises(ConfigError, match="tied head cannot have an embedding projection"):
        outlier_safe(model, tied=True)
    with pytest.raises(ModelError, match="a weight of its own"):
        outlier_safe(fresh("llama"), embproj=False, tied=True)
    expected, kept = logits(model, IDS), copy.deepcopy(model)
    outlier_safe(kept, embproj=False, tied=True)
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    outlier_safe(model, embproj=False, tied=False)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert difference(logits(model, IDS), expected) <= ROUNDING


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_transformers_neither_ties_nor_initialises_again(family: str) -> None:
    """tie_weights and init_weights, which transformers calls on many occasions, change nothing after the surgery."""
    model = fresh(family, tied=True)
    outlier_safe(model)
    train_away(model)
    before = snapshot(model)
    model.tie_weights()
    model.init_weights()
    assert is_as_it_was(model, before)
    assert model.all_tied_weights_keys == {}
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_constant_gains_become_scales(family: str) -> None:
    """A norm whose gain is one number keeps it, be it written as w or as 1 + w, and the function with it."""
    model = fresh(family)
    offset = float(family == "gemma3_text")
    gains = [0.5, -2.0, 3.0, 0.25, 1.5, 0.75, -0.5, 1.25]
    norms = [model.get_submodule(path) for path in find_norms(model)]
    with torch.no_grad():
        for index, norm in enumerate(norms):
            norm.weight.fill_(gains[index % 8] - offset)
    expected = logits(model, IDS)
    outlier_safe(model)
    scales = [module.weight.item() for module in model.modules() if isinstance(module, SingleScaleRMSNorm)]
    assert scales == [gains[index % 8] for index in range(len(norms))]
    assert difference(logits(model, IDS), expected) <= ROUNDING


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_every_part(family: str, tied: bool) -> None:
    """Three steps move every scale, both projections, the embedding and the head, and the loss goes down."""
    model = fresh(family, tied=tied).train()
    outlier_safe(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]
    parts = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, tuple(ADDED))]
    assert len(parts) == 4 + NORMS_PER_LAYER.get(family, 2) * LAYERS + 1
    for name in parts:
        assert not torch.equal(model.get_parameter(name), before[name]), name


def test_seed_decides_the_projections_and_nothing_else_is_touched() -> None:
    """The same seed gives the same model, another other projections; the two differ; random state and modes are kept."""
    models = []
    for seed in (0, 0, 1):
        model = fresh("qwen3").train()
        model.model.layers[1].eval()
        modes = {name: module.training for name, module in model.named_modules()}
        random = torch.get_rng_state()
        outlier_safe(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(module.training == modes.get(name, True) for name, module in model.named_modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        models.append(model)
    first, same, other = ([m.weight for m in model.modules() if isinstance(m, EmbeddingProjection)] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.allclose(*first)


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_and_config_rebuild_the_model(family: str) -> None:
    """apply_spec on a model whose weights were never initialised, and then the weights, give the same logits' bits."""
    model = fresh(family, tied=True)
    surgery = outlier_safe(model, seed=4)
    train_away(model)
    config = type(model.config).from_dict(model.config.to_dict())
    with no_init_weights():
        other = AutoModelForCausalLM.from_config(config).eval()
    assert apply_spec(other, surgery.spec).rows == surgery.rows
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, IDS), logits(model, IDS))


def test_masks_and_generation_work() -> None:
    """Left padding does not change a prompt's logits, and cached generation takes the argmax of full forwards."""
    model = fresh("qwen3")
    outlier_safe(model)
    train_away(model)
    prompt = IDS[:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(12) >= 3).long()[None]
    with torch.no_grad():
        got = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    assert difference(got, logits(model, prompt)) <= ROUNDING
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 3:]
    for length in range(9, 14):
        assert generated[length] == logits(model, generated[None, :length])[0, -1].argmax()


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_those_of_the_plain_model(family: str) -> None:
    """What watches a model work sees the same linears, norms and groups in an outlier-safe one."""
    expected = find_roles(fresh(family))
    model = fresh(family)
    outlier_safe(model)
    assert find_roles(model) == expected


@pytest.mark.parametrize("family", ["llama", *SCALED_EMBEDDING])
def test_low_precision_models(family: str) -> None:
    """A bf16 model gets bf16 parts, and moves by no more than bf16 rounding does."""
    model = fresh(family).bfloat16()
    exact, expected = logits(fresh(family), IDS), logits(model, IDS)
    outlier_safe(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    got = logits(model, IDS)
    assert difference(got.float(), exact) <= 3 * difference(expected.float(), exact)
