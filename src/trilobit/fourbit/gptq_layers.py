"""GPTQ of a whole decoder: layer by layer, within a layer by input, on what quantised predecessors make of the text.

For q/k/v, then o, then gate/up, then down: the second moment of what they read is collected with all before them quantised,
and the matrices that share it are quantised together. Activations and cache are at 16 bits meanwhile, online transforms on.

Attention is computed once: what its last linear reads is kept from the pass that quantises that linear, and later passes
through the layer put it there.

A layer that is done is written to disk at once, whole or not at all (storage.py), under a name that hashes weights, text and
protocol: a run that was killed reads what it finds and goes on, and gets the same weights. Only the hidden states of one
depth are held, and what that depth's attentions made.

Letters: N sequences, T positions, D width, K inputs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from trilobit.fourbit.fake import Prepared
from trilobit.fourbit.gptq import quantize_columns
from trilobit.fourbit.memory import require_available
from trilobit.fourbit.progress import fingerprint, read_kept
from trilobit.fourbit.protocol import Protocol
from trilobit.listener import SILENT, Listener
from trilobit.storage import atomic_directory, is_whole, read_json, require_free_space, write_json
from trilobit.surgery.layerwise import Stopped, first_layer_inputs, hidden_states_of, layer_calls
from trilobit.surgery.roles import decoder_layers, evaluating
from trilobit.tensors import save_tensors

WEIGHTS, SCALES, RECORD = "weights.safetensors", "scales.safetensors", "layer.json"


def gptq(
    prepared: Prepared, windows: Tensor, protocol: Protocol, progress: Path | None = None, listener: Listener = SILENT
) -> None:
    """Quantise the decoder's linears in place. windows: token ids [N, T]. progress: folder for finished layers.

    Raises ConfigError where memory will not do and for a protocol that the model was not prepared by, OutputError where the
    disk will not, ModelError that names the linear whose inputs are not finite.
    """
    prepared.require(protocol)
    prepared.protocol = protocol
    needed = require_memory(prepared, windows)
    layers = [layer for _, layer in decoder_layers(prepared.model)]
    place = None if progress is None else progress / fingerprint(prepared.model, windows, protocol)[:16]
    done = _finished(place, len(layers))
    prepared.progress = place
    if place is not None:
        left = sum(linear.weight.nbytes for site, linear in prepared.linears() if site.layer >= done)
        require_free_space(place, left, "GPTQ's progress")
    if done:
        listener.note(f"GPTQ: {done} of {len(layers)} layers were finished before.")
    for index in range(done):
        assert place is not None
        _read_layer(prepared, index, place)
    if done == len(layers):
        return
    listener.note(f"GPTQ on {len(windows)} × {windows.shape[1]} tokens: {needed / 1e9:.2f} GB beside the model.")
    model, batches, start = prepared.model, windows.split(1), time.perf_counter()
    precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    with evaluating(model):
        calls = layer_calls(model, batches[0])
        states = first_layer_inputs(model, batches, precision)
        for index, layer in enumerate(layers):

            def run(x: Tensor, layer: nn.Module = layer, index: int = index) -> Tensor:
                return hidden_states_of(layer(x, **calls[index]))

            attended: Attended | None = None
            if index >= done:
                began = time.perf_counter()
                raised, attended = _quantize_layer(prepared, index, states, run, protocol)
                if place is not None:
                    _write_layer(prepared, index, place, raised, time.perf_counter() - began)
                left = len(layers) - done
                listener.progress("GPTQ layers", index + 1 - done, left, time.perf_counter() - start)
            for number, x in enumerate(states):
                with attending(attended, number):
                    states[number] = run(x)


@dataclass
class Attended:
    """What the last linear of a layer's attention reads, after its other hooks, for each sequence; and the calls of sdpa that
    a pass makes until then."""

    linear: nn.Linear
    inputs: list[Tensor] = field(default_factory=list)
    calls: int = 0


class _Attention(TorchFunctionMode):
    """Counts calls of sdpa, of which the first `skipped` return zeros. Attention that is not sdpa is computed as ever."""

    def __init__(self, skipped: int = 0):
        super().__init__()
        self.skipped, self.calls = skipped, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls > self.skipped:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return given["query"].new_zeros(*given["query"].shape[:-1], given["value"].shape[-1])


@contextmanager
def attending(attended: Attended | None, sequence: int) -> Iterator[None]:
    """Within, the layer's attention has already been: its last linear reads what it read then."""
    if attended is None:
        yield
        return
    put = attended.linear.register_forward_pre_hook(lambda module, inputs: (attended.inputs[sequence], *inputs[1:]))
    try:
        with _Attention(attended.calls):
            yield
    finally:
        put.remove()


def _quantize_layer(
    prepared: Prepared, index: int, states: list[Tensor], run: Callable[[Tensor], Tensor], protocol: Protocol
) -> tuple[list[str], Attended | None]:
    """Returns a line for each input where damping had to be raised, and what attention made."""
    raised: list[str] = []
    attended: Attended | None = None
    members = [(site, linear) for site, linear in prepared.linears() if site.layer == index]
    ends = sum(site.role == "attention-output" for site, _ in members)
    for _, group in groupby(members, key=lambda member: member[0].group):
        together = list(group)
        where = ", ".join(site.path for site, _ in together)
        site, linear = together[0]
        kept = Attended(linear) if ends == 1 and site.role == "attention-output" else None
        moment = input_moment(linear, states, run, attended, kept)
        attended = kept or attended
        *found, damping = quantize_columns(torch.cat([linear.weight for _, linear in together]), moment, protocol, where)
        if damping != protocol.gptq_damping:
            raised.append(f"GPTQ damping {damping:g} instead of {protocol.gptq_damping:g}: {where}")
        outputs = [linear.out_features for _, linear in together]
        for (site, linear), weight, scale in zip(together, *(part.split(outputs) for part in found), strict=True):
            linear.weight.copy_(weight)
            prepared.scales[site.path] = scale
    prepared.applied += raised
    return raised, attended


def input_moment(
    linear: nn.Linear, states: list[Tensor], run: Callable[[Tensor], Tensor], attended: Attended | None = None,
    keep: Attended | None = None,
) -> Tensor:  # fmt: skip
    """Σ x xᵀ of what `linear` reads, after its other hooks, while `run` sends each of `states` through its layer: [K, K]
    float64, each sequence's share summed in fp32. keep: gets what it reads."""
    moment = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64, device=linear.weight.device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if keep is not None:
            keep.inputs.append(inputs[0])
        x = inputs[0].flatten(0, -2).float()
        moment.add_(x.T @ x)
        raise Stopped

    handle = linear.register_forward_pre_hook(add)
    try:
        for number, x in enumerate(states):
            with attending(attended, number), _Attention() as seen, suppress(Stopped):
                run(x)
            if keep is not None:
                keep.calls = seen.calls
    finally:
        handle.remove()
    return moment


def _finished(place: Path | None, layers: int) -> int:
    """How many layers, from the first on, are on disk."""
    if place is None:
        return 0
    return next((index for index in range(layers) if not is_whole(_layer(place, index))), layers)


def _layer(place: Path, index: int) -> Path:
    return place / f"layer-{index:03}"


def _write_layer(prepared: Prepared, index: int, place: Path, raised: list[str], seconds: float) -> None:
    weights = {site.path: linear.weight.detach() for site, linear in prepared.linears() if site.layer == index}
    with atomic_directory(_layer(place, index)) as directory:
        save_tensors(weights, directory / WEIGHTS)
        save_tensors({path: prepared.scales[path] for path in weights}, directory / SCALES)
        write_json(directory / RECORD, {"raised": raised, "seconds": seconds})


def _read_layer(prepared: Prepared, index: int, place: Path) -> None:
    weights, scales = (read_kept(_layer(place, index), name) for name in (WEIGHTS, SCALES))
    record = read_json(_layer(place, index) / RECORD)
    with torch.no_grad():
        for site, linear in prepared.linears():
            if site.layer == index:
                linear.weight.copy_(weights[site.path])
                prepared.scales[site.path] = scales[site.path].to(linear.weight.device)
    prepared.applied += record["raised"]
    prepared.earlier += record["seconds"]


def require_memory(prepared: Prepared, windows: Tensor) -> int:
    """Bytes that GPTQ needs beyond the model: hidden states and what attention made of them, a moment with its factors, a
    layer's activations. Raises ConfigError, with what would help, if this machine has fewer."""
    linears = [linear for _, linear in prepared.linears()]
    widest, rows = max(x.in_features for x in linears), max(x.out_features for x in linears)
    embedding: Any = prepared.model.get_input_embeddings()
    attended = max((linear.in_features for site, linear in prepared.linears() if site.role == "attention-output"), default=0)
    states: int = windows.numel() * (embedding.embedding_dim + attended) * prepared.model.dtype.itemsize
    needed = states + 5 * 8 * widest**2 + 4 * 4 * rows * widest + 16 * 4 * windows.shape[1] * widest
    what = (
        f"GPTQ on {len(windows)} × {windows.shape[1]} tokens needs {needed / 1e9:.2f} GB beside the model, of which "
        f"{states / 1e9:.2f} for hidden states"
    )
    require_available(needed, linears[0].weight.device, what, "Lower --calibration-samples, or --precision bf16.")
    return needed
