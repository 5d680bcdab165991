"""Every knob of a protocol does something: it moves logits, or the rotation that is learned, and names no effect it lacks."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import VOCABULARY, build, logits, tokens
from trilobit.errors import ConfigError, ModelError
from trilobit.fourbit.fake import Prepared, prepare, round_weights
from trilobit.fourbit.gptq_layers import gptq
from trilobit.fourbit.protocol import PRESETS, Protocol
from trilobit.fourbit.rotation import learned_rotation
from trilobit.listener import SILENT

OSP = PRESETS["osp"]
GPTQ = replace(OSP, method="gptq")
SHORT = {"learning_steps": 2, "learning_batch": 2}
TURNED = replace(OSP.rotated("quarot"), value_hadamard=False, ffn_hadamard=False, **SHORT)
LEARNED = replace(OSP.rotated("spinquant"), **SHORT)
NARROW: dict[str, Any] = {"head_dim": 4, "intermediate_size": 4}  # groups of four numbers often have one sign
ALL = ("inputs", "outputs", "keys", "values", "weights")
UNCHANGED = {"name", "full_precision", "arithmetic", "gptq_order"}  # labels, and what has one value
CALIBRATION = {field.name for field in fields(Protocol) if field.name.startswith("calibration_")}  # test_calibration.py
WEIGHTS = replace(OSP.with_bits("4-16-16"), weight_symmetric=False, weight_group=4)

KNOBS: list[tuple[Protocol, str, Any]] = [
    (OSP, "weight_bits", 3), (OSP, "activation_bits", 8), (OSP, "key_bits", 8), (OSP, "value_bits", 8),
    (OSP, "weight_symmetric", False), (OSP, "weight_group", 8), (OSP, "weight_clip", "none"), (OSP, "clip_grid", 10),
    (OSP, "clip_shrink", 0.1), (OSP, "clip_norm", 1.0), (OSP, "activation_symmetric", True), (OSP, "activation_clip", 0.8),
    (OSP, "output_group", "token"), (OSP, "cache_symmetric", True), (OSP, "cache_clip", 0.8),
    *((WEIGHTS if part == "weights" else OSP, "ranges_with_zero", tuple(x for x in ALL if x != part)) for part in ALL),
    (OSP, "residual_rotation", "hadamard"), (TURNED, "residual_rotation", "learned"), (TURNED, "value_hadamard", True),
    (OSP, "head_hadamard", True), (OSP, "ffn_hadamard", True), (OSP, "query_key_hadamard", "none"),
    (TURNED, "rotation_seed", 1), (OSP, "method", "gptq"), (GPTQ, "gptq_damping", 1.0), (GPTQ, "gptq_act_order", True),
    (LEARNED, "learning_steps", 3), (LEARNED, "learning_batch", 3), (LEARNED, "learning_rate", 0.5),
    (LEARNED, "learning_activation_bits", 8), (LEARNED, "learning_cache_bits", 16), (LEARNED, "learning_through_ranges", True),
]  # fmt: skip


def windows() -> Tensor:
    return torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(5))


def quantized(protocol: Protocol, **shape: Any) -> Tensor:
    prepared = prepare(build("llama", **shape), protocol, windows())
    if protocol.method == "gptq":
        gptq(prepared, windows(), protocol)
    else:
        round_weights(prepared, protocol)
    with prepared.computing(protocol):
        return logits(prepared.model, tokens(length=12))


def test_every_knob_is_here() -> None:
    """None is left out but labels, what calibration texts are (test_calibration.py) and the block, which changes nothing."""
    named = {name for _, name, _ in KNOBS} | UNCHANGED | CALIBRATION | {"gptq_block"}
    assert named == {field.name for field in fields(Protocol)}


@pytest.mark.parametrize(("base", "name", "value"), KNOBS)
def test_a_knob_moves_the_logits(base: Protocol, name: str, value: Any) -> None:
    """Where it applies, another value of one knob gives another model."""
    shape = NARROW if name == "ranges_with_zero" else {}
    base = replace(base, ranges_with_zero=ALL) if shape else base
    changed = replace(base, **{name: value})
    assert changed.sha256 != base.sha256
    assert not torch.allclose(quantized(changed, **shape), quantized(base, **shape), rtol=1e-3, atol=1e-3)


def test_the_block_changes_rounding_errors_alone() -> None:
    """Columns between lazy updates are arithmetic, with and without groups."""
    for base in (GPTQ, replace(GPTQ, weight_group=8)):
        weights = [prepare(build("llama").double(), base) for _ in range(2)]
        for prepared, block in zip(weights, (128, 5), strict=True):
            gptq(prepared, windows(), replace(base, gptq_block=block))
        first, second = ({site.path: linear.weight for site, linear in prepared.linears()} for prepared in weights)
        assert all(torch.allclose(first[path], second[path], atol=1e-6) for path in first)


def learned(protocol: Protocol, **shape: Any) -> Tensor:
    return learned_rotation(build("llama", **shape), protocol, windows(), None, SILENT)[0].matrix


@pytest.mark.parametrize(
    "change",
    [
        {"method": "gptq"}, {"weight_bits": 3}, {"weight_bits": 16}, {"weight_symmetric": False},
        {"activation_symmetric": True}, {"activation_clip": 0.8}, {"output_group": "token"}, {"cache_symmetric": True},
        {"cache_clip": 0.8},
        {"ranges_with_zero": ()}, {"query_key_hadamard": "none"}, {"ffn_hadamard": False}, {"head_hadamard": True},
        {"value_hadamard": False}, {"rotation_seed": 1}, {"learning_rate": 0.5}, {"learning_activation_bits": 8},
        {"learning_cache_bits": 16}, {"learning_cache_bits": 3}, {"learning_through_ranges": True}, {"learning_steps": 1},
        {"learning_batch": 1},
    ],
)  # fmt: skip
def test_learning_sees_the_protocol(change: dict[str, Any]) -> None:
    """Whatever decides what is quantised while the rotation is learned, or how it is learned, gives another rotation."""
    shape = NARROW if "ranges_with_zero" in change else {}
    assert not torch.allclose(learned(replace(LEARNED, **change), **shape), learned(LEARNED, **shape), atol=1e-7)


@pytest.mark.parametrize(
    "change", [{"activation_bits": 8}, {"key_bits": 8, "value_bits": 16}, {"weight_bits": 3}, {"weight_clip": "none"}]
)
def test_learning_sees_no_more_than_it_says(change: dict[str, Any]) -> None:
    """Weights that GPTQ makes later are in full while it learns, and the rows of a column share one rotation."""
    base = replace(LEARNED, method="gptq")
    assert torch.equal(learned(replace(base, **change)), learned(base))


def test_a_model_is_computed_with_by_its_own_protocol() -> None:
    """Other rotations than a model was prepared by, or other weights than it has, are refused; so is preparing twice."""
    turned = OSP.rotated("ffn")
    prepared: Prepared = prepare(build("llama"), turned)
    for attempt in (lambda: round_weights(prepared, OSP), lambda: gptq(prepared, windows(), GPTQ)):
        with pytest.raises(ConfigError, match=r"another protocol: ffn_hadamard \(True, False\)"):
            attempt()
    with pytest.raises(ConfigError, match="ffn_hadamard"), prepared.computing(OSP):
        pass
    with pytest.raises(ConfigError, match="prepared already"):
        prepare(prepared.model, turned)
    round_weights(prepared, turned)
    with pytest.raises(ConfigError, match=r"weight_bits \(4, 3\)"), prepared.computing(turned.with_bits("3-4-4")):
        pass
    with prepared.computing(turned.with_bits("4-8-16")):
        pass


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("family", "shape", "says"),
    [
        ("youtu", {**LATENT, "qk_rope_head_dim": 4}, "heads of different widths"),
        ("youtu", {**LATENT, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}, "look like the last one of an MLP"),
        ("apertus", {}, "has 0 linears that look like"),
    ],
)  # fmt: skip
def test_layers_of_another_kind_are_refused(family: str, shape: dict[str, Any], says: str) -> None:
    """Latent attention, and activations that hide which linear ends the MLP, are said and not guessed at."""
    with pytest.raises(ModelError, match=says):
        prepare(build(family, **shape), OSP)


def test_a_refused_model_is_as_it_was() -> None:
    """An MLP that no Hadamard matrix fits is noticed before the residual stream is turned."""
    model = build("llama", intermediate_size=46)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for rotate in ("quarot", "spinquant"):
        with pytest.raises(Exception, match="width 46"):
            prepare(model, replace(LEARNED.rotated(rotate)), windows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(module, "_trilobit_changes") for module in model.modules())
