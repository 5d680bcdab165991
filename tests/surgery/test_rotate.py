"""A turn of the residual stream is fused into the weights and changes no logit; what it would change is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from exact import exact
from families import FAMILIES, REFUSED, build, logits, tokens
from trilobit.errors import ModelError
from trilobit.fourbit.hadamard import hadamard_matrix
from trilobit.nn.outlier_safe import random_orthogonal
from trilobit.surgery.rotate import Rotation, rotate
from trilobit.surgery.stream import find_stream

TURNABLE = [family for family in FAMILIES if family not in ("gemma3_text", "olmo2")]
WIDTH, HEAD = 32, 8


def matrix(width: int = WIDTH, seed: int = 3) -> torch.Tensor:
    return random_orthogonal(width, torch.Generator().manual_seed(seed))


def unchanged(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def kept(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TURNABLE)
def test_logits_are_unchanged(family: str, tied: bool, values: bool) -> None:
    """In float64 to 1e-10 of the largest logit, with gains, biases and tied heads; every matrix has changed."""
    model = exact(build(family, tied=tied))
    before, weights = logits(model, tokens()), kept(model)
    report = rotate(model, matrix(), hadamard_matrix(HEAD) / HEAD**0.5 if values else None)
    assert (logits(model, tokens()) - before).abs().max() <= 1e-10 * before.abs().max()
    assert all(not torch.allclose(p, weights[name]) for name, p in model.named_parameters() if p.ndim == 2)
    stream = find_stream(model)
    assert all((model.get_submodule(path).weight == 1).all() for path in stream.norms)
    assert report.untied == tied and model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings
    assert (report.norms, report.writers, report.width) == (2 * 3 + 1, 2 * 3, WIDTH)
    assert report.readers == 3 * (2 if family == "phi3" else 5)
    assert report.values.startswith("2 heads of 8" if values else "left alone")


def test_biases_of_writers_are_turned() -> None:
    """Llama with biases everywhere, those of what writes to the stream and of values included."""
    model = exact(build("llama", attention_bias=True, mlp_bias=True))
    before = logits(model, tokens())
    rotate(model, matrix(), matrix(HEAD))
    assert (logits(model, tokens()) - before).abs().max() <= 1e-10 * before.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*TURNABLE, "gemma"])
def test_stock_models_in_fp32(family: str, tied: bool) -> None:
    """To 1e-4 of the logits' length, as they come from transformers; Gemma applies 1 + w and scales its embedding."""
    model = build(family, tied=tied, head_dim=HEAD)
    before = logits(model, tokens())
    rotate(model, matrix(), matrix(HEAD))
    assert (logits(model, tokens()) - before).norm() <= 1e-4 * before.norm()
    assert all((model.get_submodule(path).weight == (family != "gemma")).all() for path in find_stream(model).norms)


def test_rotations_compose() -> None:
    """First values and gains alone (R = I), then the stream: the same model as both at once."""
    once, twice = (exact(build("qwen3")) for _ in range(2))
    rotate(once, matrix(), matrix(HEAD))
    rotate(twice, torch.eye(WIDTH), matrix(HEAD))
    report = rotate(twice, matrix())
    assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(once.parameters(), twice.parameters(), strict=True))
    assert report.values == "left alone"


def test_a_rotation_may_be_a_function() -> None:
    """A Rotation's function of rows gives the model that its matrix gives, and names itself in the report."""
    turn = matrix()
    first, second = (build("qwen2") for _ in range(2))
    rotate(first, turn)
    report = rotate(second, Rotation(WIDTH, lambda x: x @ turn.to(x), "a turn"))
    assert unchanged(first, kept(second))
    assert "turned by a turn" in str(report)


def test_an_outlier_is_spread() -> None:
    """A channel of the embedding a hundred times the others': after a Hadamard turn what linears read has no outlier."""
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] += 50

    def peak(model: PreTrainedModel) -> float:
        seen: list[torch.Tensor] = []
        handle = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        logits(model, tokens())
        handle.remove()
        return (seen[0].abs().amax(-1) / seen[0].abs().median(-1).values).median().item()

    before = peak(model)
    signs = torch.randint(0, 2, (WIDTH,)) * 2 - 1
    rotate(model, signs[:, None] * hadamard_matrix(WIDTH).T / WIDTH**0.5)
    assert before > 50
    assert peak(model) < 5


def test_a_rotated_model_is_a_stock_model(tmp_path: Path) -> None:
    """It is saved and loaded by transformers alone, untied, with the same logits."""
    model = build("llama", tied=True)
    rotate(model, matrix())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_bf16_is_rounded_once() -> None:
    """A bf16 model gets the weights that its fp32 copy gets, rounded."""
    low = build("llama").bfloat16()
    high = copy.deepcopy(low).float()
    for model in (low, high):
        rotate(model, matrix(), matrix(HEAD))
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(low.parameters(), high.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_dependence_on_channels_is_noticed_in_any_dtype(dtype: torch.dtype) -> None:
    """Channels of the stream that are scaled by a few per cent move the logits by less than bf16 forgave; refused, and every
    bit of the model is as it was."""
    model = build("llama").to(dtype)
    scale = 1 + 0.05 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * scale, *inputs[1:]))
    before = kept(model)
    with pytest.raises(ModelError, match="move by 0\\.0"):
        rotate(model, matrix())
    assert unchanged(model, before) and model.dtype == dtype
    handle.remove()
    rotate(model, matrix())


def _layer_norms() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return OPTForCausalLM(config)


def _layer_scale() -> PreTrainedModel:
    model = build("llama")
    scale = torch.linspace(0.5, 1.5, WIDTH)
    model.model.layers[1].mlp.register_forward_hook(lambda m, i, output: output * scale)
    return model


def _second_reader() -> PreTrainedModel:
    model = build("llama")
    mlp: Any = model.model.layers[1].mlp
    down = mlp.down_proj
    mlp.forward = lambda x: down(torch.sigmoid(mlp.gate_proj(x)) * mlp.up_proj(x)) * x.sigmoid()
    return model


MODELS = {
    "olmo2": (lambda: build("olmo2"), r"q_proj reads the residual stream without a norm"),
    "gemma3": (lambda: build("gemma3_text"), r"post_attention_layernorm is a norm behind the block"),
    "layer norms": (_layer_norms, "is a LayerNorm, which is not an RMSNorm"),
    "layer scale": (_layer_scale, "depends on single channels"),
    "second reader of a norm": (_second_reader, "depends on single channels"),
    "mixtral": (REFUSED["mixtral"][0], "owns weight"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_refusals_say_why_and_change_nothing(kind: str) -> None:
    """What does not commute with a turn is refused with its reason, all weights and hooks as they were."""
    make, reason = MODELS[kind]
    model = make()
    before = kept(model)
    with pytest.raises(ModelError, match=reason):
        rotate(model, matrix())
    assert unchanged(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert sum(len(m._forward_hooks) for m in model.modules()) == (kind == "layer scale")


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [(matrix(16), "of width 16, the residual stream of width 32"), (matrix() * 1.01, "not an orthogonal"),
     (matrix()[:, :8], "not an orthogonal"), (matrix() * torch.nan, "not an orthogonal")],
)  # fmt: skip
def test_rotations_that_would_change_the_model(rotation: torch.Tensor, reason: str) -> None:
    """A matrix of another width, or one that is not orthogonal, is refused."""
    model = build("llama")
    before = kept(model)
    with pytest.raises(ModelError, match=reason):
        rotate(model, rotation)
    assert unchanged(model, before)


@pytest.mark.parametrize(("case", "reason"), [("gate", "more than a mixture"), ("width", "no heads of 24")])
def test_values_that_cannot_be_told_apart(case: str, reason: str) -> None:
    """The stream is turned, values are left alone and the report says why."""
    model = exact(build("llama"))
    if case == "gate":
        gate = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, inputs: (inputs[0] * gate,))
    before = logits(model, tokens())
    report = rotate(model, matrix(), matrix(24 if case == "width" else HEAD))
    assert reason in report.values
    assert (logits(model, tokens()) - before).abs().max() <= 1e-10 * before.abs().max()


def test_shared_weights_are_refused() -> None:
    """A weight that two linears share would be turned twice."""
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ModelError, match="shares weights"):
        rotate(model, matrix())


def test_a_foreign_matrix_is_refused() -> None:
    """A matrix outside the decoder that neither reads nor writes the stream is not overlooked."""
    model = build("llama")
    model.model.spare = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"spare\.weight .* neither reads nor writes"):
        rotate(model, matrix())
