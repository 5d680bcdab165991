"""Which rotations a protocol asks for, in which order, and what a model has no room for.

Fused first (the residual stream and, by head, values: quarot.py, spinquant.py), then online ones (the MLP's last linear,
across heads: online.py). A learned rotation costs hours: it is kept on disk under a name that hashes all it follows from.
"""

import copy
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.fourbit.attention import CacheQuantizer, cache_quantizer, value_width
from trilobit.fourbit.memory import require_available
from trilobit.fourbit.online import OnlineReport, attach_ffn_hadamard, attach_head_hadamard
from trilobit.fourbit.progress import fingerprint, read_kept
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.quarot import quarot, turned
from trilobit.fourbit.rtn import Grid, Quantizer, round_to_nearest
from trilobit.fourbit.spinquant import LearnedRotation, learn
from trilobit.listener import Listener
from trilobit.storage import atomic_directory, is_whole, read_json, write_json
from trilobit.surgery.rotate import Rotation, RotationReport
from trilobit.tensors import save_tensors

MATRIX = "rotation.safetensors"


def apply_rotations(
    model: PreTrainedModel, protocol: Protocol, windows: Tensor | None, progress: Path | None, listener: Listener
) -> tuple[list[str], float]:
    """Apply the protocol's rotations to `model`, in place, its function unchanged. Returns what was done, a line each, and
    the seconds that an earlier process spent on what was read back.

    windows: token ids [N, T] that a learned rotation is fitted on. Raises ModelError for a residual stream that cannot be
    turned (LayerNorm, Gemma 3, OLMo 2), UnsupportedError for an MLP whose width has no Hadamard matrix.
    """
    reports: list[RotationReport | OnlineReport] = []
    earlier = 0.0
    if protocol.residual_rotation == "hadamard":
        reports.append(quarot(model, seed=protocol.rotation_seed, values=protocol.value_hadamard))
    elif protocol.residual_rotation == "learned":
        assert windows is not None, "a learned rotation is fitted on text"
        learned, earlier = learned_rotation(model, protocol, windows, progress, listener)
        reports.append(turned(model, learned.rotation, protocol.value_hadamard))
    reports += _attach_online(model, protocol)
    applied = [line for report in reports for line in str(report).splitlines()]
    for line in applied:
        listener.note(line)
    return applied, earlier


def learning_cache(model: PreTrainedModel, protocol: Protocol) -> CacheQuantizer | None:
    """What happens to keys and values while the rotation is learned; None at 16 bits."""
    bits = protocol.learning_cache_bits
    return cache_quantizer(model, replace(protocol, key_bits=bits, value_bits=bits))


def _attach_online(model: PreTrainedModel, protocol: Protocol) -> list[OnlineReport]:
    reports: list[OnlineReport] = [attach_head_hadamard(model)] if protocol.head_hadamard else []
    return [*reports, attach_ffn_hadamard(model)] if protocol.ffn_hadamard else reports


def learned_rotation(
    model: PreTrainedModel, protocol: Protocol, windows: Tensor, progress: Path | None, listener: Listener
) -> tuple[LearnedRotation, float]:
    """R [D, D] float64, learned on windows [N, T] with the protocol's budget, or read from where an earlier run kept it; and
    the seconds that this earlier run spent.

    Learned on a copy of `model` that has its values turned and its online transforms: these change what is quantised. Raises
    ConfigError where memory will not do for the copy.
    """
    place = None if progress is None else progress / f"rotation-{fingerprint(model, windows, protocol)[:16]}"
    if place is not None and is_whole(place):
        found = read_kept(place, MATRIX)["rotation"]
        record = read_json(place / "learned.json")
        listener.note("The learned rotation was finished before.")
        return LearnedRotation(found, **record["learned"] | {"losses": tuple(record["learned"]["losses"])}), record["seconds"]
    start = time.perf_counter()
    needed = sum(parameter.nbytes for parameter in model.parameters())
    what = f"Learning a rotation needs a copy of the model: {needed / 1e9:.2f} GB"
    require_available(needed, model.device, what, "Use --rotate quarot, or --precision bf16.")
    bits = protocol.learning_activation_bits
    student = copy.deepcopy(model)
    embedding: Any = student.get_input_embeddings()
    turned(student, Rotation.of(torch.eye(embedding.embedding_dim)), protocol.value_hadamard)
    _attach_online(student, protocol)
    by_head, zeros = protocol.output_group == "head", protocol.ranges_with_zero
    grid, clip = Grid(bits, protocol.activation_symmetric), protocol.activation_clip
    outputs = Quantizer(grid, clip, value_width(student), "outputs" in zeros) if by_head else None
    learned = learn(
        student, windows,
        quantise_activations=Quantizer(grid, clip, None, "inputs" in zeros), quantise_outputs=outputs,
        cache=learning_cache(student, protocol),
        quantise_weights=(lambda x: round_to_nearest(x, protocol)) if _rounds(protocol) else None,
        steps=protocol.learning_steps, batch=protocol.learning_batch, lr=protocol.learning_rate, seed=protocol.rotation_seed,
        through_ranges=protocol.learning_through_ranges, listener=_Steps(listener),
    )  # fmt: skip
    if place is not None:
        record = {field.name: getattr(learned, field.name) for field in fields(learned) if field.name != "matrix"}
        with atomic_directory(place) as directory:
            save_tensors({"rotation": learned.matrix}, directory / MATRIX)
            write_json(directory / "learned.json", {"learned": record, "seconds": time.perf_counter() - start})
    return learned, 0.0


def _rounds(protocol: Protocol) -> bool:
    """Whether weights are quantised while the rotation is learned: only those that are rounded to nearest later, as the
    authors of SpinQuant do."""
    return protocol.method == "rtn" and protocol.weight_bits < 16


class _Steps(Listener):
    """Rows of learning as progress."""

    def __init__(self, listener: Listener):
        self.listener, self.start = listener, time.perf_counter()

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        self.listener.progress("Learning the rotation, tokens", row["tokens"], max_tokens, time.perf_counter() - self.start)
