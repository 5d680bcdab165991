"""GPTQ of a whole decoder: in order, on quantised predecessors, and continued where it was killed."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from families import FAMILIES, VOCABULARY, build, logits, tokens
from trilobit.errors import ConfigError, ModelError, OutputError
from trilobit.fourbit import gptq_layers, memory
from trilobit.fourbit.fake import Prepared, prepare, round_weights
from trilobit.fourbit.gptq import quantize_columns
from trilobit.fourbit.gptq_layers import WEIGHTS, gptq, require_memory
from trilobit.fourbit.progress import fingerprint
from trilobit.fourbit.protocol import PRESETS, Protocol
from trilobit.listener import Listener

OSP = replace(PRESETS["osp"], method="gptq")


def windows(samples: int = 6, length: int = 16, seed: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def quantized(family: str, protocol: Protocol = OSP, **more: Any) -> Prepared:
    prepared = prepare(build(family), protocol)
    gptq(prepared, windows(), protocol, **more)
    return prepared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotate", ["none", "ffn"])
def test_it_loses_less_than_rounding(family: str, rotate: Any) -> None:
    """On the calibration text the logits are nearer to the original's than after rounding to nearest, in every family."""
    protocol = OSP.rotated(rotate).with_bits("3-16-16")
    original = logits(build(family), windows())

    def off(prepared: Prepared) -> float:
        with prepared.computing(protocol):
            return (logits(prepared.model, windows()) - original).norm().item()

    rounded = prepare(build(family), protocol)
    round_weights(rounded, protocol)
    assert off(quantized(family, protocol)) < off(rounded)


def test_each_linear_sees_its_quantised_predecessors() -> None:
    """The last down_proj is GPTQ of itself for what it reads in the finished model: all before it was quantised first."""
    prepared = quantized("llama")
    model, last = prepared.model, prepared.roles.sites[-1].path
    moment = torch.zeros(48, 48, dtype=torch.float64)

    def add(module: nn.Module, inputs: Any) -> None:
        x = inputs[0].flatten(0, -2)
        moment.add_((x.T @ x).double())

    handle = model.get_submodule(last).register_forward_pre_hook(add)
    for ids in windows().split(1):
        logits(model, ids)
    handle.remove()
    expected, _, _ = quantize_columns(build("llama").get_submodule(last).weight, moment, OSP)
    assert torch.allclose(model.get_submodule(last).weight, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_computed_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention made is put in place in later passes through its layer: the same weights to the bit as with all of it
    computed again."""
    with Counting() as once:
        found = quantized(family)
    monkeypatch.setattr(gptq_layers, "attending", lambda *_: nullcontext())
    with Counting() as again:
        expected = quantized(family)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True))
    later = 3 * len(windows()) * len(found.roles.layers)  # for gate and up, down, and what the next layer gets
    assert again.calls - once.calls == later


class Counting(TorchFunctionMode):
    """Counts calls of sdpa."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_what_is_not_a_decoder_linear_stays() -> None:
    """Embedding, head, norms and biases are untouched, and no hook is left."""
    prepared, fresh = quantized("qwen2"), build("qwen2")
    paths = {f"{site.path}.weight" for site in prepared.roles.sites}
    for (name, got), (_, before) in zip(prepared.model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(got, before) == (name not in paths), name
    assert not any(module._forward_pre_hooks for module in prepared.model.modules())


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int) -> None:
    """A run that dies after any layer and is started again gives, bit by bit, the weights of one that was left alone."""
    whole = quantized("llama").model.state_dict()
    write, written = gptq_layers._write_layer, 0

    def dying(prepared: Prepared, index: int, *rest: Any) -> None:
        nonlocal written
        if index == killed_after:
            raise KeyboardInterrupt
        write(prepared, index, *rest)
        written += 1

    with monkeypatch.context() as patched:
        patched.setattr(gptq_layers, "_write_layer", dying)
        with pytest.raises(KeyboardInterrupt):
            quantized("llama", progress=tmp_path)
    assert written == killed_after
    heard = Hearing()
    again = quantized("llama", progress=tmp_path, listener=heard).model.state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert heard.layers == list(range(1, 4 - killed_after))


class Hearing(Listener):
    def __init__(self) -> None:
        self.layers: list[int] = []

    def progress(self, what: str, done: int, total: int, seconds: float) -> None:
        assert what == "GPTQ layers" and done <= total
        self.layers.append(done)


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    """Nothing is computed a second time, and a half-written layer counts as none."""
    first = quantized("llama", progress=tmp_path).model.state_dict()
    heard = Hearing()
    second = quantized("llama", progress=tmp_path, listener=heard).model.state_dict()
    assert heard.layers == [] and all(torch.equal(first[name], second[name]) for name in first)
    (torn,) = tmp_path.glob("*/layer-001")
    (torn / WEIGHTS).write_bytes(b"")
    third = quantized("llama", progress=tmp_path, listener=heard).model.state_dict()
    assert heard.layers == [1, 2] and all(torch.equal(first[name], third[name]) for name in first)


def test_damage_on_disk_is_refused(tmp_path: Path) -> None:
    """A layer whose bytes changed at the same length is named, not used."""
    quantized("llama", progress=tmp_path)
    (file,) = tmp_path.glob("*/layer-001/" + WEIGHTS)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OutputError, match=r"does not match .* Remove .*layer-001"):
        quantized("llama", progress=tmp_path)


def test_other_weights_text_or_knobs_share_nothing() -> None:
    """The fingerprint changes with each of them, and not with the bits of activations and cache."""
    model = build("llama")
    base = fingerprint(model, windows(), OSP)
    assert base == fingerprint(model, windows(), OSP.with_bits("4-8-16"))
    other = build("llama")
    other.config.rms_norm_eps = 1e-2
    others = [
        fingerprint(other, windows(), OSP),
        fingerprint(model, windows(seed=6), OSP),
        fingerprint(model, windows(), OSP.with_bits("3-4-4")),
        fingerprint(build("llama", seed=1), windows(), OSP),
    ]
    assert len({base, *others}) == 5
    assert base == fingerprint(model, windows(), replace(OSP, calibration_data="elsewhere.txt"))


def test_the_linear_whose_inputs_are_not_finite_is_named() -> None:
    """A weight of infinity makes the next linear's Hessian useless: said with its path. (The probe sees other tokens.)"""
    model = build("llama")
    prepared = prepare(model, OSP)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.(gate_proj|up_proj|down_proj).*not finite"):
        gptq(prepared, windows(), OSP)


def test_memory_is_asked_for_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less free than is needed nothing starts, and the message has both numbers and what to lower."""
    prepared, many = prepare(build("llama"), OSP), windows(64, 64)
    needed = require_memory(prepared, many)
    assert needed > many.numel() * 32 * 4
    monkeypatch.setattr(memory, "available", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=r"needs .* GB beside the model.*Lower --calibration-samples"):
        gptq(prepared, many, OSP)
    assert torch.equal(logits(prepared.model, tokens()), logits(build("llama"), tokens()))


def test_memory_grows_with_the_square_of_the_widest_input() -> None:
    """The moment and its factors are K × K float64, at least three of them at once; hidden states come on top, twice."""
    narrow, wide = (require_memory(prepare(build("llama", intermediate_size=k), OSP), windows()) for k in (480, 4800))
    assert wide - narrow > 3 * 8 * (4800**2 - 480**2)
    more = require_memory(prepare(build("llama"), OSP), windows(60)) - require_memory(prepare(build("llama"), OSP), windows(6))
    assert more == 54 * 16 * (32 + 32) * 4


def test_disk_is_asked_for_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress of a whole decoder has to fit; nothing is computed where it does not."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(gptq_layers, "_quantize_layer", None)
    with pytest.raises(OutputError, match="GPTQ's progress needs"):
        quantized("llama", progress=tmp_path)


def test_damping_that_was_raised_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its linears, also by a run that reads the layer back; scales are read back as well."""
    moment = gptq_layers.input_moment

    def indefinite(linear: nn.Linear, *rest: Any) -> Tensor:
        found = moment(linear, *rest)
        return found - found.diagonal().mean() * 0.5 * torch.eye(len(found)) if linear.in_features == 48 else found

    monkeypatch.setattr(gptq_layers, "input_moment", indefinite)
    first = quantized("llama", progress=tmp_path)
    assert len(first.applied) == 3 and all("instead of 0.01: model.layers." in line for line in first.applied)
    monkeypatch.setattr(gptq_layers, "_quantize_layer", None)
    again = quantized("llama", progress=tmp_path)
    assert again.applied == first.applied and again.earlier > 0
    assert all(torch.equal(scale, again.scales[path]) for path, scale in first.scales.items())


def test_free_memory_is_known_here() -> None:
    """Linux says how much is available; it is more than nothing and less than a petabyte."""
    free = memory.available(torch.device("cpu"))
    assert free is None or 0 < free < 1e15


def test_bf16_models_are_quantised_in_fp32() -> None:
    """A bf16 model keeps its dtype and loses about what the fp32 one loses."""
    prepared = prepare(build("llama").bfloat16(), OSP)
    gptq(prepared, windows(), OSP)
    full = quantized("llama")
    for (_, half), (_, linear) in zip(prepared.linears(), full.linears(), strict=True):
        assert half.weight.dtype == torch.bfloat16
        assert all(len(row.unique()) <= 16 for row in half.weight)
        step = linear.weight.abs().max() / 7
        assert (half.weight.float() - linear.weight).abs().mean() < 0.5 * step
