"""Protocol contextual against float64 activations kept whole; what is planted is found; the model is left alone."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from families import LAYERS, REFUSED, build, tokens
from trilobit.errors import ModelError
from trilobit.measure import probes as probes_module
from trilobit.measure import stream as stream_module
from trilobit.measure.contextual import Contextual, SiteOutliers, measure_contextual
from trilobit.measure.kurtosis import measure_osp
from trilobit.measure.probes import SiteName, activations

INSIDE: tuple[SiteName, ...] = ("attention-input", "attention-output", "mlp-input", "mlp-output", "residual")


def contextual(model: PreTrainedModel, windows: Tensor, sequences: int = 2) -> Contextual:
    return measure_contextual(model, windows, str, sequences=sequences)


def at(result: Contextual, layer: int | None, site: SiteName) -> SiteOutliers:
    row = result.at(layer, site)
    assert row is not None, (layer, site)
    return row


def naive_activations(model: PreTrainedModel, windows: Tensor) -> dict[tuple[int | None, str], Tensor]:
    """All of a Llama-like model's activations at once, in float64, sites taken by name: (layer, site) → [N, T, W]."""
    model = copy.deepcopy(model).double()
    kept: dict[tuple[int | None, str], Tensor] = {}

    def keep(layer: int | None, site: str, of: str):
        def hook(module: nn.Module, inputs: Any, output: Any = None) -> None:
            kept[layer, site] = inputs[0] if of == "input" else output

        return hook

    for index, layer in enumerate(model.model.layers):
        parts = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        for site, module in zip(INSIDE, parts, strict=False):
            module.register_forward_hook(keep(index, site, "input"))
        layer.register_forward_hook(keep(index, "residual", "output"))
    model.model.norm.register_forward_hook(keep(None, "final-norm", "output"))
    with torch.no_grad():
        model(input_ids=windows)
    return kept


def naive_kurtosis(row: list[float]) -> float:
    mean = math.fsum(row) / len(row)
    second, fourth = (math.fsum((v - mean) ** power for v in row) / len(row) for power in (2, 4))
    return fourth / second**2 - 3


@pytest.mark.parametrize("sequences", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_streaming_equals_all_at_once(family: str, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kurtosis, max / median, top channels, their energy and places are those of float64 activations kept whole, however
    sequences are batched and blocks are cut."""
    monkeypatch.setattr(stream_module, "BLOCK_ELEMENTS", 200)
    model, windows = build(family), tokens(5, 11)
    result = contextual(model, windows, sequences)
    expected = naive_activations(model, windows)
    assert {(row.layer, row.site) for row in result.sites} == set(expected)
    for row in result.sites:
        x = expected[row.layer, row.site]
        assert row.width == x.shape[-1]
        for part, first_position, values in ((row.first, 0, x[:, :1]), (row.later, 1, x[:, 1:])):
            flat = values.flatten(0, 1)
            assert part.tokens == len(flat)
            kurtosis = [naive_kurtosis(token) for token in flat.tolist()]
            assert part.excess_kurtosis == pytest.approx(math.fsum(kurtosis) / len(kurtosis), rel=1e-4, abs=1e-5)
            assert part.max_abs == pytest.approx(flat.abs().max().item(), rel=1e-5)
            assert part.max_to_median == pytest.approx((flat.abs().max() / flat.abs().median()).item(), rel=0.009)
            peaks, channels = flat.abs().amax(0).topk(5)
            assert [c.channel for c in part.channels] == channels.tolist()
            assert [c.max_abs for c in part.channels] == pytest.approx(peaks.tolist(), rel=1e-5)
            for channel in part.channels:
                energy = flat[:, channel.channel].square().sum() / flat.square().sum()
                assert channel.energy_share == pytest.approx(energy.item(), rel=1e-5)
                sequence, position = divmod(int(values[..., channel.channel].abs().argmax()), values.shape[1])
                assert (channel.sequence, channel.position) == (sequence, position + first_position)
                assert channel.token == str(windows[channel.sequence, channel.position].item())
    residual = [at(result, layer, "residual") for layer in range(LAYERS)]
    assert result.excess_kurtosis == pytest.approx(sum(row.later.excess_kurtosis for row in residual) / LAYERS)
    assert result.first_excess_kurtosis == pytest.approx(sum(row.first.excess_kurtosis for row in residual) / LAYERS)


def test_the_model_is_left_as_it_was() -> None:
    """Measuring changes no parameter, mode, gradient, hook, attention implementation or random state."""
    model = build("llama").train()
    model.model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    contextual(model, tokens())
    activations(model, 1, "mlp-output", tokens()[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    measure_osp(model, tokens(), False)  # transformers leaves hooks of its own where it gave hidden states
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), random)


def test_a_planted_channel_is_found() -> None:
    """One channel of one down_proj's input, scaled by 100 (and its weights by 1/100), tops that site and no other changes."""
    model, windows = build("llama"), tokens(3, 20)
    before = contextual(model, windows)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[29] *= 100
        mlp.down_proj.weight[:, 29] /= 100
    result = contextual(model, windows)
    extremes = {row.site: row.layer for row, where, _ in result.extremes() if where == "later"}
    assert extremes["mlp-output"] == 1
    part = at(result, 1, "mlp-output").later
    assert part.channels[0].channel == 29
    assert part.channels[0].energy_share > 0.9
    assert part.max_to_median is not None
    assert part.max_to_median > 10 * (at(before, 1, "mlp-output").later.max_to_median or math.inf)
    assert part.excess_kurtosis > 20 > at(before, 1, "mlp-output").later.excess_kurtosis
    for row in result.sites:
        if (row.layer, row.site) != (1, "mlp-output"):
            assert row.later.excess_kurtosis == pytest.approx(
                at(before, row.layer, row.site).later.excess_kurtosis, rel=1e-3, abs=1e-3
            )


def test_the_first_position_is_apart() -> None:
    """A massive activation of the token that begins each sequence is in the first position's numbers and not in the rest."""
    model, windows = build("llama"), tokens(4, 10)
    windows[:, 0], windows[:, 1:] = 1, windows[:, 1:].clamp_min(2)
    with torch.no_grad():
        model.model.embed_tokens.weight[1, 5] = 1000
    result = contextual(model, windows)
    for layer in range(LAYERS):
        row = at(result, layer, "residual")
        assert (row.first.channels[0].channel, row.first.channels[0].token, row.first.channels[0].position) == (5, "1", 0)
        assert row.first.max_abs > 900 > 100 > row.later.max_abs
        assert row.first.excess_kurtosis > 25 > 5 > row.later.excess_kurtosis
        assert all(channel.position > 0 for channel in row.later.channels)
    assert result.first_excess_kurtosis > 25 > 5 > result.excess_kurtosis


def test_what_is_not_finite_is_named() -> None:
    """The first layer and site that is not finite is named; damaged weights by what reads them."""
    model, windows = build("llama"), tokens(2, 20)

    def overflow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.where(torch.arange(inputs[0].shape[1])[:, None] == 15, math.inf, inputs[0]),)

    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(overflow)
    with pytest.raises(ModelError, match="not finite, first at layer 1, mlp-output"):
        contextual(model, windows)
    handle.remove()
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = math.nan
    windows[1, 3] = 50
    with pytest.raises(ModelError, match="not finite, first at layer 0, attention-input"):
        contextual(model, windows)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"not finite, first in what model\.layers\.1\.mlp\.down_proj reads"):
        contextual(model, windows)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "falcon"])
def test_where_linears_have_no_roles_what_passes_between_layers_is_measured(family: str) -> None:
    """The residual stream is that of a naive float64 measure; what is missing is said."""
    model, windows = REFUSED[family][0]().eval(), tokens(3, 12)
    result = contextual(model, windows)
    layers = range(model.config.num_hidden_layers)
    assert {(row.layer, row.site) for row in result.sites} == {*((i, "residual") for i in layers), (None, "final-norm")}
    assert "owns" in result.unwatched and not contextual(build("llama"), windows).unwatched
    seen: list[Tensor] = []
    handle = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)][1].register_forward_hook(
        lambda module, inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    kurtosis = [naive_kurtosis(token) for token in seen[0][:, 1:].flatten(0, 1).double().tolist()]
    assert at(result, 1, "residual").later.excess_kurtosis == pytest.approx(math.fsum(kurtosis) / len(kurtosis), rel=1e-4)


def test_logits_are_no_final_norm() -> None:
    """Llama 4's base model is the whole one: what it ends in is the head's, and not measured."""
    result = contextual(REFUSED["llama4"][0](), tokens())
    assert {row.site for row in result.sites} == {"residual"}


def test_what_passes_between_layers_is_one_vector_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several streams (Gemma 3n), a NaN in the head and an eye on later tokens are refused where roles are not known, too."""
    model = REFUSED["gpt2"][0]()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(ModelError, match="logits that are not finite, first in the head"):
        contextual(model, tokens())
    model = REFUSED["gpt2"][0]()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 3] = math.inf
    with pytest.raises(ModelError, match=r"not finite, first in what transformer\.h\.1 passes on"):
        contextual(model, tokens())
    model = REFUSED["gpt2"][0]()
    model.transformer.h[0].register_forward_hook(lambda module, inputs, output: output + output.flip(1))
    with pytest.raises(ModelError, match="not causal"):
        contextual(model, tokens())
    monkeypatch.setattr(probes_module, "require_causal", lambda model: None)
    model = REFUSED["gpt2"][0]()
    for layer in (model.transformer.h[1], model.transformer.h[0]):
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].sum(0, keepdim=True), *inputs[1:]))
    model.transformer.h[0].register_forward_hook(lambda module, inputs, output: output.expand(4, -1, -1))
    with pytest.raises(ModelError, match=r"transformer\.h\.0 passes on \(4, 8, 32\) for 8 tokens, not one vector each"):
        contextual(model, tokens())


def test_what_has_no_layers_is_refused() -> None:
    """Without decoder layers there is nothing to measure; an encoder is no language model."""
    with pytest.raises(ModelError, match="not causal"):
        contextual(REFUSED["bert-lm"][0](), tokens())
    model = build("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="has no transformers decoder layers"):
        contextual(model, tokens())
