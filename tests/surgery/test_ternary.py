"""What ternarize makes of a model: which modules, which parameters, and which function."""

import json
from functools import cache
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES, SCALED_EMBEDDING, build, logits, tokens
from trilobit.errors import ModelError
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear, TernaryModule, ternary_modules
from trilobit.surgery.roles import Roles, find_roles
from trilobit.surgery.ternary import (
    Cover,
    Placement,
    Plan,
    TernarySpec,
    apply_plan,
    measure_rms,
    set_strengths,
    ternarize,
)

PLACEMENTS, COVERS = get_args(Placement), get_args(Cover)
IDS = tokens()


@cache
def roles_of(family: str, tied: bool) -> Roles:
    return find_roles(build(family, tied=tied))


def covers(family: str, tied: bool) -> list[Cover]:
    """Covers that do not need the embedding of a family whose embedding is refused."""
    if family not in SCALED_EMBEDDING:
        return list(COVERS)
    return ["projections"] if tied else ["projections", "+lm_head"]


def off(model: PreTrainedModel) -> PreTrainedModel:
    layers = model.config.num_hidden_layers
    set_strengths(model, [0.0] * layers, [0.0] * layers)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_placement_and_cover(family: str, tied: bool) -> None:
    """Exactly the covered linears become ternary, norms sit where placed, and the table's parts add up to the model."""
    roles = roles_of(family, tied)
    for placement, cover in product(PLACEMENTS, covers(family, tied)):
        model = build(family, tied=tied)
        original = {name: p.detach().clone() for name, p in model.named_parameters()}
        surgery = ternarize(model, TernarySpec(placement=placement, cover=cover), roles=roles)
        expected = {s.path for s in roles.sites}
        expected |= {roles.head} if cover != "projections" else set()
        expected |= {roles.embedding} if cover == "+embeddings" or (cover == "+lm_head" and tied) else set()
        found = dict(ternary_modules(model))
        assert set(found) == expected
        for site in roles.sites:
            module = found[site.path]
            wanted = placement == "every" or (placement == "output" and site.role != "input")
            assert isinstance(module, TernaryLinear)
            assert (module.rms_norm is not None) == wanted
        if cover != "projections":
            head = found[roles.head]
            assert isinstance(head, TernaryLinear)
            assert head.rms_norm is None
        parameters = dict(model.named_parameters())
        inserted = {name for name in parameters if name.endswith(".rms_norm.weight")}
        assert set(parameters) - inserted == set(original)
        assert all(torch.equal(parameters[name], value) for name, value in original.items())
        assert all(parameters[name].eq(1).all() for name in inserted)
        total = sum(p.numel() for p in model.parameters())
        assert sum(row.parameters for row in surgery.rows) == surgery.parameters == total
        ternary = {id(p): p.numel() for m in found.values() for p in m.parameters(recurse=False)}
        assert sum(row.parameters for row in surgery.rows if row.became.startswith("ternary")) == sum(ternary.values())
        assert sum(row.parameters for row in surgery.rows if row.what == "inserted norm") == sum(
            parameters[n].numel() for n in inserted
        )
        assert f"{total:,}" in str(surgery)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_off_without_norms_is_the_original(family: str, tied: bool) -> None:
    """Placement none at λ = 0 has the original's logits bit for bit, under every cover; at λ = 1 it has not."""
    expected = logits(build(family, tied=tied), IDS)
    for cover in covers(family, tied):
        model = build(family, tied=tied)
        ternarize(model, TernarySpec(placement="none", cover=cover), roles=roles_of(family, tied))
        quantized = logits(model, IDS)
        assert quantized.isfinite().all()
        assert not torch.allclose(quantized, expected, rtol=0.05)
        assert torch.equal(logits(off(model), IDS), expected)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_off_under_autocast_is_the_original(family: str) -> None:
    """The same under bf16 autocast, biases included."""
    model = build(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, IDS)
        ternarize(model, TernarySpec(placement="none"), roles=roles_of(family, False))
        assert torch.equal(logits(off(model), IDS), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns(family: str, tied: bool) -> None:
    """With everything covered, off, blending and on, each parameter gets a finite gradient that is not zero."""
    model = build(family, tied=tied)
    ternarize(model, TernarySpec(cover=covers(family, tied)[-1]), roles=roles_of(family, tied))
    for strength in (0.0, 0.5, 1.0):
        set_strengths(model, [strength] * 3, [strength] * 3)
        model.zero_grad()
        nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # A key's bias shifts every score of a query alike (but for RoPE), which softmax does not see.
            assert parameter.grad.any() or name.endswith("k_proj.bias"), (name, strength)


@pytest.mark.parametrize("cover", ["+lm_head", "+embeddings"])
def test_tied_head_stays_one_parameter(cover: Cover) -> None:
    """A tied embedding and head become ternary together, share one parameter and one quantised table, and save once."""
    model = build("smollm3", tied=True)
    before = sum(p.numel() for p in model.parameters())
    surgery = ternarize(model, TernarySpec(placement="none", cover=cover))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, TernaryEmbedding)
    assert isinstance(head, TernaryLinear)
    assert head.weight is embedding.weight
    assert surgery.parameters == before == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        embedding.weight.mul_(2)
    assert head.weight is embedding.weight
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("tied", "cover"), [(True, "+lm_head"), (True, "+embeddings"), (False, "+embeddings")])
def test_scaled_embedding_is_refused_before_anything_changes(tied: bool, cover: Cover) -> None:
    """Gemma's embedding multiplies its rows; replacing it would drop the factor, so this cover is refused."""
    model = build("gemma3_text", tied=tied)
    expected = logits(model, IDS)
    with pytest.raises(ModelError, match="Gemma3TextScaledWordEmbedding"):
        ternarize(model, TernarySpec(cover=cover), roles=roles_of("gemma3_text", tied))
    assert not ternary_modules(model)
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("cover", ["projections", "+embeddings"])
def test_strengths_go_to_their_layers(cover: Cover) -> None:
    """Each layer gets its own λ_w and λ_a; the embedding follows the first layer and the head the last."""
    model = build("llama")
    ternarize(model, TernarySpec(cover=cover), roles=roles_of("llama", False))
    weights, activations = [0.125, 0.25, 0.5], [1.0, 0.75, 0.0]
    set_strengths(model, weights, activations)
    layer_of = {s.path: s.layer for s in roles_of("llama", False).sites} | {"model.embed_tokens": 0, "lm_head": 2}
    modules = ternary_modules(model)
    assert len(modules) == 21 + (2 if cover == "+embeddings" else 0)
    for path, module in modules:
        got = (float(module.weight_strength), float(module.activation_strength))
        assert got == (weights[layer_of[path]], activations[layer_of[path]]), path
    with pytest.raises(AssertionError):
        set_strengths(model, weights[:2], activations[:2])


def test_options_reach_the_modules() -> None:
    """Gain, activations, scale and eps of the spec are those of every ternary module."""
    model = build("llama")
    spec = TernarySpec(gain="scalar", activations="none", scale="group-64", eps=1e-3, cover="+embeddings")
    ternarize(model, spec, roles=roles_of("llama", False))
    for _, module in ternary_modules(model):
        if isinstance(module, TernaryLinear):
            assert (module.rule.granularity, module.rule.int8_activations, module.rule.eps) == ("group-64", False, 1e-3)
            assert module.rms_norm is None or module.rms_norm.weight.shape == (1,)
        else:
            assert isinstance(module, TernaryEmbedding)
            assert module.granularity == "group-64"


def test_modes_and_devices_are_kept() -> None:
    """Replaced modules are in the mode of those they replace."""
    for training in (True, False):
        model = build("llama").train(training)
        ternarize(model, TernarySpec(cover="+embeddings"), calibration=[IDS], roles=roles_of("llama", False))
        assert all(m.training == training for m in model.modules() if isinstance(m, TernaryModule))


def naive_rms(model: PreTrainedModel, path: str, batches: list[Tensor]) -> tuple[float, Tensor]:
    inputs: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    for batch in batches:
        logits(model, batch)
    handle.remove()
    rows = torch.cat(inputs).double()
    values = sorted((sum(v * v for v in row) / len(row)) ** 0.5 for row in rows.tolist())
    return values[(len(values) - 1) // 2], rows


def test_measured_rms_is_the_median_over_tokens() -> None:
    """measure_rms weighs tokens, not batches, takes an iterator, and a few huge tokens do not move its number."""
    model = build("llama")
    batches = [tokens(1, 3, 5), tokens(4, 11, 6)]
    paths = ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    measured = measure_rms(model, paths, iter(batches))
    assert list(measured) == paths
    for path, got in measured.items():
        expected, rows = naive_rms(model, path, batches)
        assert got == pytest.approx(expected, rel=1e-6)
        spread = rows.pow(2).mean(1).sqrt()
        assert spread.min() < got < spread.max()
    assert measure_rms(model, paths, []) == {}
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("gain", ["vector", "scalar"])
@pytest.mark.parametrize("size", [0.05, 20.0])
def test_calibrated_gains_keep_the_function_better_than_ones(gain: str, size: float) -> None:
    """Where linears receive inputs whose RMS is far from one, calibrated norms at λ = 0 change the logits much less."""
    changes = {}
    for calibration in ([], [tokens(4, 16, 7)]):
        model = build("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight.mul_(size)
                layer.post_attention_layernorm.weight.mul_(size)
                for name in ("q_proj", "k_proj", "v_proj"):
                    layer.self_attn.get_submodule(name).weight.div_(size)
                layer.mlp.gate_proj.weight.div_(size)
        expected = logits(model, IDS)
        spec = TernarySpec(gain=gain)  # pyright: ignore[reportArgumentType]
        ternarize(model, spec, calibration=calibration, roles=roles_of("llama", False))
        for path, module in ternary_modules(model):
            assert isinstance(module, TernaryLinear)
            assert module.rms_norm is not None
            assert module.rms_norm.weight.unique().numel() == 1
            assert bool(module.rms_norm.weight[0] == 1) == (not calibration), path
        changes[bool(calibration)] = (logits(off(model), IDS) - expected).norm().item() / expected.norm().item()
    assert changes[True] < 0.6 * changes[False], changes


@pytest.mark.parametrize("tied", [False, True])
def test_plan_survives_json_and_rebuilds_the_function(tied: bool) -> None:
    """A plan read back from JSON, applied to a fresh model that loads the weights, gives the same logits' bits."""
    spec = TernarySpec(placement="output", cover="+lm_head", scale="row", gain="scalar")
    model = build("qwen2", tied=tied)
    surgery = ternarize(model, spec, calibration=[IDS])
    plan = Plan.from_json(json.loads(json.dumps(surgery.plan.to_json())))
    assert plan == surgery.plan
    fresh = build("qwen2", tied=tied, seed=5)
    assert apply_plan(fresh, plan).rows == surgery.rows
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, IDS), logits(model, IDS))
