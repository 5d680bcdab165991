"""Which rotations a protocol asks for, in which order, and what a model has no room for.

Fused first (the residual stream and, by head, values: quarot.py, spinquant.py), then online ones (the MLP's last linear,
across heads: online.py). A learned rotation costs hours: it is kept on disk under a name that hashes all it follows from.
"""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.fourbit.hadamard import constructible
from trilobit.fourbit.online import OnlineReport, attach_ffn_hadamard, attach_head_hadamard
from trilobit.fourbit.progress import fingerprint
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.quarot import head_rotation, head_width, quarot
from trilobit.fourbit.rtn import Grid, Quantizer, round_to_nearest
from trilobit.fourbit.spinquant import learn
from trilobit.listener import Listener
from trilobit.storage import atomic_directory, is_whole, save_tensors, verify_manifest, write_json
from trilobit.surgery.rotate import Rotation, rotate

MATRIX = "rotation.safetensors"


def apply_rotations(
    model: PreTrainedModel, protocol: Protocol, windows: Tensor | None, progress: Path | None, listener: Listener
) -> None:
    """Apply the protocol's rotations to `model`, in place, its function unchanged, and say what was done.

    windows: token ids [N, T] that a learned rotation is fitted on. Raises ModelError for a residual stream that cannot be
    turned (LayerNorm, Gemma 3, OLMo 2), UnsupportedError for an MLP whose width has no Hadamard matrix.
    """
    if protocol.residual_rotation == "hadamard":
        listener.note(str(quarot(model, seed=protocol.rotation_seed, values=protocol.value_hadamard)))
    elif protocol.residual_rotation == "learned":
        assert windows is not None, "a learned rotation is fitted on text"
        matrix = learned_rotation(model, protocol, windows, progress, listener)
        listener.note(str(rotate(model, matrix, _value_rotation(model, protocol))))
    for report in _attach_online(model, protocol):
        listener.note(str(report))


def _value_rotation(model: PreTrainedModel, protocol: Protocol) -> Rotation | None:
    width = head_width(model)
    return head_rotation(width) if protocol.value_hadamard and constructible(width) else None


def _attach_online(model: PreTrainedModel, protocol: Protocol) -> list[OnlineReport]:
    reports = [attach_head_hadamard(model)] if protocol.head_hadamard else []
    return [*reports, attach_ffn_hadamard(model)] if protocol.ffn_hadamard else reports


def learned_rotation(
    model: PreTrainedModel, protocol: Protocol, windows: Tensor, progress: Path | None, listener: Listener
) -> Tensor:
    """R [D, D] float64, learned on windows [N, T] with the protocol's budget, or read from where an earlier run kept it.

    Learned on a copy of `model` that has its values turned and its online transforms: these change what is quantised.
    """
    place = None if progress is None else progress / f"rotation-{fingerprint(model, windows, protocol)[:16]}"
    if place is not None and is_whole(place):
        verify_manifest(place)
        listener.note("The learned rotation was finished before.")
        return load_file(place / MATRIX)["rotation"]
    bits = protocol.learning_activation_bits
    student = copy.deepcopy(model)
    embedding: Any = student.get_input_embeddings()
    rotate(student, torch.eye(embedding.embedding_dim), _value_rotation(student, protocol))
    _attach_online(student, protocol)
    found = learn(
        student, windows,
        quantise_activations=Quantizer(Grid(bits, protocol.activation_symmetric), protocol.activation_clip),
        quantise_weights=(lambda x: round_to_nearest(x, protocol)) if _rounds(protocol) else None,
        steps=protocol.learning_steps, batch=protocol.learning_batch, lr=protocol.learning_rate, seed=protocol.rotation_seed,
        through_ranges=protocol.learning_through_ranges, listener=_Steps(listener),
    )  # fmt: skip
    losses = f"{found.losses[0]:.4f} to {found.losses[-1]:.4f}"
    listener.note(f"rotation learned in {found.steps} steps on {found.tokens:,} tokens: loss {losses}, {found.skipped} skipped")
    if place is not None:
        with atomic_directory(place) as directory:
            save_tensors({"rotation": found.matrix}, directory / MATRIX)
            write_json(directory / "losses.json", list(found.losses))
    return found.matrix


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
