"""Cells of the table against a second implementation: naive.py's whole Llama in numpy, from the published settings alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from families import VOCABULARY, build
from fourbit import naive
from trilobit.fourbit.fake import prepare, round_weights
from trilobit.fourbit.gptq_layers import gptq
from trilobit.fourbit.hadamard import transform as hadamard
from trilobit.fourbit.protocol import PRESETS
from trilobit.fourbit.quarot import matrix, random_rotation
from trilobit.measure.perplexity import nats

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}


def sequences(seed: int, count: int = 3) -> torch.Tensor:
    """No token twice in a row of them: equal values make exact ties, which fp32 and float64 break differently."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCABULARY, generator=generator)[:13] for _ in range(count)])


@pytest.mark.parametrize("bits", ["16-16-16", "4-8-16", "4-8-8", "4-4-16", "4-4-4"])
@pytest.mark.parametrize("column", ["RTN", "FFN Hadamard", "GPTQ"])
def test_cells_are_those_of_a_second_implementation(bits: str, column: str) -> None:
    """Every row by RTN, + FFN Hadamard and + GPTQ: nats per token within 1e-5 of the reference, and not the original's."""
    rotate: Any = "none" if column == "RTN" else "ffn"
    method: Any = "gptq" if column == "GPTQ" else "rtn"
    protocol = replace(PRESETS["osp"].with_bits(bits).rotated(rotate), method=method)
    text, calibration = sequences(1), sequences(2, 6)

    model = build("llama", **SIZES).double()
    reference = naive.Llama(model, (protocol.weight_bits, protocol.activation_bits, protocol.key_bits))
    if rotate == "ffn":
        reference.turn_online(naive.sylvester(32), across_heads=False)
    original = reference.nats(text) if bits == "16-16-16" else naive.Llama(model, (16, 16, 16)).nats(text)
    prepared = prepare(model, protocol)
    if protocol.weight_bits < 16:
        if method == "rtn":
            round_weights(prepared, protocol)
            reference.round_weights()
        else:
            gptq(prepared, calibration, protocol)
            reference.gptq_weights(calibration)
    with prepared.computing(protocol):
        total, count = nats(model, text, 2)
    assert total / count == pytest.approx(reference.nats(text), abs=1e-5)
    assert bits == "16-16-16" or abs(total / count - original) > 1e-4


@pytest.mark.parametrize("bits", ["4-8-8", "4-4-4", "3-5-6"])
@pytest.mark.parametrize("preset", ["osp", "quarot"])
def test_rotated_cells_are_those_of_a_second_implementation(bits: str, preset: str) -> None:
    """QuaRot with GPTQ, by osp's settings and by its own preset (symmetric, clipped, across heads): within 1e-5 nats of the
    reference, which fuses the same matrices by itself."""
    protocol = replace(PRESETS[preset].with_bits(bits).rotated("quarot"), method="gptq")
    text, calibration = sequences(3), sequences(4, 6)
    model = build("llama", **SIZES, tied=True).double()
    widths = (protocol.weight_bits, protocol.activation_bits, protocol.key_bits)
    own: dict[str, Any] = {"symmetric": True, "clip": 0.9, "cache_clip": 0.95, "by_head": False}
    reference = naive.Llama(model, widths, **(own if preset == "quarot" else {}))
    reference.rotate(matrix(random_rotation(32, 0)).numpy(), naive.sylvester(8))
    reference.turn_online(naive.sylvester(32), across_heads=preset == "quarot")
    reference.gptq_weights(calibration)
    prepared = prepare(model, protocol)
    gptq(prepared, calibration, protocol)
    with prepared.computing(protocol):
        total, count = nats(model, text, 2)
    assert total / count == pytest.approx(reference.nats(text), abs=1e-5)


def test_the_references_hadamard_is_orthonormal() -> None:
    """Signs by parity, symmetric, its own inverse; and ours on the same width is orthonormal as well."""
    matrix = naive.sylvester(16)
    assert (abs(matrix @ matrix - torch.eye(16).numpy()) < 1e-12).all()
    ours = hadamard(torch.eye(16, dtype=torch.float64))
    assert torch.allclose(ours @ ours.T, torch.eye(16, dtype=torch.float64))
