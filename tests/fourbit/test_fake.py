"""Models that compute as if quantised."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, build, logits, tokens
from trilobit.fourbit.fake import Prepared, prepare, round_weights
from trilobit.fourbit.protocol import PRESETS, Protocol
from trilobit.fourbit.rtn import Grid, Quantizer, round_to_nearest

OSP = PRESETS["osp"]


def computed(model: Any, protocol: Protocol) -> Tensor:
    prepared = prepare(model, protocol)
    round_weights(prepared, protocol)
    with prepared.computing(protocol):
        return logits(model, tokens(length=12))


def loss(family: str, bits: str, rotate: Any = "none") -> float:
    model = build(family)
    before = logits(model, tokens(length=12))
    return (computed(model, OSP.with_bits(bits).rotated(rotate)) - before).norm().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_sixteen_bits_are_the_original_exactly(family: str, tied: bool) -> None:
    """At 16-16-16 without rotations every logit is the original's, bit by bit."""
    model = build(family, tied=tied)
    before = logits(model, tokens(length=12))
    assert torch.equal(computed(model, OSP.with_bits("16-16-16")), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ffn_hadamard_keeps_the_function(family: str) -> None:
    """Rotated inputs and counter-rotated weights of the MLP's last linear cancel, and the weights did change."""
    model = build(family)
    before, weights = logits(model, tokens(length=12)), [p.clone() for p in model.parameters()]
    after = computed(model, OSP.with_bits("16-16-16").rotated("ffn"))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    assert sum(not torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True)) == 3  # a layer each


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_counts_and_more_bits_lose_less(family: str) -> None:
    """Weights, activations, keys and values each move the logits; at 8 bits much less than at 4."""
    for place in range(4):
        eight, four = ("-".join(str(bits if i == place else 16) for i in range(4)) for bits in (8, 4))
        assert 0 < loss(family, eight) < 0.5 * loss(family, four), place


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_linear_reads_quantised_inputs(family: str) -> None:
    """What reaches each decoder linear has at most 16 values a token, or a head of it at o_proj; the head's input is left."""
    model = build(family)
    prepared = prepare(model, OSP)
    seen: dict[str, Tensor] = {}
    with prepared.computing(OSP):
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        handles = [
            module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
            for name, module in linears
        ]
        logits(model, tokens(length=12))
        for handle in handles:
            handle.remove()
    sites = {site.path: site for site in prepared.roles.sites}
    assert set(seen) == {*sites, prepared.roles.head}
    for name, x in seen.items():
        role = sites[name].role if name in sites else "head"
        rows = x.flatten(0, -2) if role != "attention-output" else x.unflatten(-1, (4, 8)).flatten(0, -2)
        most = max(len(row.unique()) for row in rows)
        assert (most > 16) == (role == "head") or role == "attention-output", (name, most)
        by_head = Quantizer(Grid(4, False), zero_inside=role != "attention-output")
        if role != "head":
            assert torch.allclose(by_head(rows), rows, rtol=1e-4, atol=1e-5), name


def test_afterwards_the_model_is_plain_again() -> None:
    """Outside the block no hook and no change of attention is left, only the weights."""
    model = build("llama")
    prepared = prepare(model, OSP.rotated("none"))
    round_weights(prepared, OSP)
    with prepared.computing(OSP):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    fresh = build("llama")
    for site, linear in prepared.linears():
        assert torch.equal(linear.weight, round_to_nearest(fresh.get_submodule(site.path).weight, OSP))
        linear.weight = fresh.get_submodule(site.path).weight
    assert torch.equal(logits(model, tokens()), logits(fresh, tokens()))


def test_shared_inputs_are_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v read one tensor, gate and up another: four quantisations a layer, not seven."""
    model, count = build("llama"), 0
    original = Quantizer.__call__

    def counted(self: Quantizer, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return original(self, x)

    monkeypatch.setattr(Quantizer, "__call__", counted)
    prepared = prepare(model, OSP)
    with prepared.computing(OSP.with_bits("16-4-16")):
        logits(model, tokens())
    assert count == 4 * 3


def test_readers_of_one_tensor_are_not_confused() -> None:
    """The shared result is dropped after its last reader, and a forward that stopped half way leaves nothing stale."""
    model, ids = build("llama"), tokens()
    prepared: Prepared = prepare(model, OSP)
    with prepared.computing(OSP):
        first = logits(model, ids)
        k = next(linear for site, linear in prepared.linears() if site.path.endswith("k_proj"))

        def stop(module: nn.Module, inputs: Any) -> None:
            raise RuntimeError

        handle = k.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError):
            logits(model, ids.flip(1))
        handle.remove()
        assert torch.equal(logits(model, ids), first)


def test_bf16_models_stay_bf16() -> None:
    """A bf16 model computes in bf16 around fp32 quantisation."""
    model = build("qwen2").bfloat16()
    assert computed(model, OSP).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
