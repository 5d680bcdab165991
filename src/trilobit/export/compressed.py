"""compressed-tensors: weights of 2, 4 or 8 bits that transformers and vLLM read, made by a protocol of fourbit.

    weights      code · s, symmetric, a scale for each row (`channel`) or group of inputs (`group`)
                 pack-quantized: 32/b codes an int32; int-quantized (8 bits with quantised activations): int8
    activations  a range for each token (`token`, `dynamic`), or for each head of it (`group`) at the attention's last linear

The format names less than a protocol does: what it has no words for is refused, not approximated. Its readers compute the
scales of symmetric activations otherwise (2 maxabs/(2^b − 1) instead of maxabs/(2^(b−1) − 1)), widen every asymmetric
range to hold zero, and have no cache with a scale for each token and head and no transforms in front of linears here.

The model is quantised in memory, written, read back by transformers and compared with what is in memory: the same activations
are quantised on both sides. Letters: O outputs, K inputs, G groups of a row.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilobit.config.export import ExportConfig
from trilobit.config.quantize import QuantizeConfig
from trilobit.errors import ExportError, VerificationError
from trilobit.export.check import PROBE_WINDOWS, Check, Row, probe_windows
from trilobit.export.hf import write_companions
from trilobit.export.verify import compare, load_stock, noise_floor
from trilobit.formats import PackQuantized
from trilobit.fourbit.calibration import calibration_windows
from trilobit.fourbit.evaluate import plan
from trilobit.fourbit.fake import Prepared, prepare, round_weights
from trilobit.fourbit.gptq_layers import gptq
from trilobit.fourbit.progress import windows_fingerprint
from trilobit.fourbit.protocol import PRESETS, Protocol
from trilobit.fourbit.quarot import head_width
from trilobit.infer.load import load
from trilobit.listener import Listener
from trilobit.tensors import Entry, stream_tensors

FORM = "compressed-tensors"
BITS = "4-16-16"
MOST_ERROR = 0.01
"""Of a linear's outputs, ‖Δ‖/‖y‖."""


def require_package() -> None:
    """Raise ExportError where the package that reads the format is missing: nothing is written that cannot be checked."""
    if find_spec("compressed_tensors") is None:
        raise ExportError("--to compressed-tensors needs the package of that name: pip install 'trilobit[four]'.")


def settings_of(config: ExportConfig) -> tuple[QuantizeConfig, Protocol]:
    """The protocol that `config` asks for, and what its calibration text is read by. Raises ConfigError; ExportError for a
    protocol that the format has no words for, with what it has."""
    name = config.protocol or "osp"
    settings = QuantizeConfig(
        models=(config.model,), data=config.data or "", protocol=name, method=config.method,
        bits=config.bits or (BITS if name in PRESETS else None), calibration=config.calibration,
        calibration_samples=config.calibration_samples, calibration_length=config.calibration_length,
    )  # fmt: skip
    ((column,),) = (plan(settings),)
    (protocol,) = column.protocols
    if config.weight_group is not None:
        protocol = replace(protocol, weight_group=config.weight_group)
    if (why := obstacle(protocol)) is not None:
        raise ExportError(f"--to {FORM} cannot hold {protocol.bits} by protocol {protocol.name}: {why}.")
    if protocol.activation_bits < 16:
        protocol = replace(protocol, ranges_with_zero=tuple(dict.fromkeys([*protocol.ranges_with_zero, "inputs", "outputs"])))
    return settings, protocol


def obstacle(protocol: Protocol) -> str | None:
    """What of `protocol` the format has no words for; None if nothing."""
    if protocol.weight_bits not in PackQuantized.BITS:
        return f"weights have {', '.join(map(str, PackQuantized.BITS))} bits there: --bits 4-16-16, for example"
    if not protocol.weight_symmetric:
        return "weights are symmetric there (weight_symmetric)"
    if min(protocol.key_bits, protocol.value_bits) < 16:
        return "it has no cache with a scale for each token and head: --bits 4-4-16, for example"
    if protocol.ffn_hadamard or protocol.head_hadamard:
        return "it has no transforms in front of linears: take a protocol without ffn_hadamard and head_hadamard"
    if protocol.activation_bits < 16 and protocol.activation_symmetric:
        return "its symmetric activations have other scales (activation_symmetric)"
    if protocol.activation_bits < 16 and protocol.activation_clip != 1:
        return "its activations are not clipped (activation_clip)"
    return None


def write(config: ExportConfig, place: Path, directory: Path, listener: Listener) -> tuple[str, str, Check]:
    """Quantise the model at `place`, write it to `directory`, and check transformers' reading. Returns form, reason, check.

    Raises ExportError for a model that is ternary or that the format cannot hold, VerificationError for another reading.
    """
    settings, protocol = settings_of(config)
    loaded = load(place)
    if loaded.plan is not None:
        raise ExportError(f"--to {FORM} quantises full-precision models, and this one is ternary: --to native, gguf or hf.")
    windows = probe_windows(loaded, config.data, PROBE_WINDOWS[FORM])
    calibration = calibration_windows(loaded, settings, protocol) if protocol.calibrates else None
    if calibration is not None:
        protocol = replace(protocol, calibration_sha256=windows_fingerprint(calibration))
    prepared = prepare(loaded.model, protocol, calibration, None, listener)
    _require_groups(prepared, protocol)
    _round_kept(prepared)
    if protocol.method == "rtn":
        round_weights(prepared, protocol, listener)
    else:
        assert calibration is not None, "GPTQ is fitted on text"
        gptq(prepared, calibration, protocol, None, listener)
    listener.note("writing, and checking what was written")
    stream_tensors(entries_of(prepared, protocol), directory)
    content = {"dtype": "bfloat16", "quantization_config": quantization_config(prepared, protocol)}
    write_companions(directory, loaded.model, None, loaded.tokenizer, FORM, content)
    rows = _compared(prepared, protocol, directory, windows, place)
    limits = (
        f"every linear within {MOST_ERROR:.0%} on the same input; the first row: same argmax at 98.5 % and perplexity within "
        "0.1 %, or no further off than the model's own last bits take it"
    )
    grain = "row" if protocol.weight_group is None else f"group of {protocol.weight_group}"
    made = {"rtn": "rounded to nearest", "gptq": "by GPTQ"}[protocol.method]
    form = f"{layout(protocol)}, W{protocol.weight_bits}A{protocol.activation_bits}, a scale for each {grain}"
    return form, f"{made}; protocol {protocol.name}, sha256 {protocol.sha256[:16]}", Check(rows, limits)


def layout(protocol: Protocol) -> str:
    """The format's name for how codes are stored: what its readers expect for these bits."""
    return "int-quantized" if protocol.weight_bits == 8 and protocol.activation_bits < 16 else "pack-quantized"


def entries_of(prepared: Prepared, protocol: Protocol) -> list[Entry]:
    """Codes [O, K], packed, scales [O, G] and shapes of the rounded linears; matrices beside them in bf16, the rest in fp32."""
    entries, packed, bits = [], layout(protocol) == "pack-quantized", protocol.weight_bits
    rounded = {f"{path}.weight": path for path in prepared.scales}
    for name, parameter in prepared.model.named_parameters():
        shape, path = tuple(parameter.shape), rounded.get(name)
        if path is None:
            entries.append(Entry(name, _stored(parameter), shape, lambda p=parameter: p))
            continue
        scale = prepared.scales[path]
        codes = partial(levels, parameter, scale)
        if packed:
            width = -(-shape[1] * bits // 32)
            entries += [
                Entry(f"{path}.weight_packed", torch.int32, (shape[0], width), lambda c=codes: PackQuantized.pack(c(), bits)),
                Entry(f"{path}.weight_shape", torch.int64, (2,), lambda s=shape: torch.tensor(s)),
            ]
        else:
            entries.append(Entry(name, torch.int8, shape, codes))
        entries.append(Entry(f"{path}.weight_scale", torch.float32, tuple(scale.shape), lambda s=scale: s))
    return entries


def levels(weight: Tensor, scale: Tensor) -> Tensor:
    """The codes [O, K] int8 of a rounded weight code · scale, scale [O, G]."""
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    codes = (weight.detach() / wide).round()
    assert torch.equal(codes * wide, weight), "not a rounded weight"
    return codes.to(torch.int8)


def quantization_config(prepared: Prepared, protocol: Protocol) -> dict[str, Any]:
    """What config.json says of the linears: one group of them for each way in which inputs are quantised."""
    weights: dict[str, Any] = {"num_bits": protocol.weight_bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= (
        {"strategy": "channel"} if protocol.weight_group is None else {"strategy": "group", "group_size": protocol.weight_group}
    )
    token: dict[str, Any] = {"num_bits": protocol.activation_bits, "type": "int", "symmetric": False, "dynamic": True}
    head = {"strategy": "group", "group_size": head_width(prepared.model)}
    members: dict[bool, list[str]] = {}
    for site, _ in prepared.linears():
        by_head = site.role == "attention-output" and protocol.output_group == "head" and protocol.activation_bits < 16
        members.setdefault(by_head, []).append(site.path)
    groups = {}
    for number, (by_head, paths) in enumerate(sorted(members.items())):
        inputs = None if protocol.activation_bits == 16 else token | (head if by_head else {"strategy": "token"})
        groups[f"group_{number}"] = {
            "targets": paths, "weights": weights, "input_activations": inputs, "format": layout(protocol),
        }  # fmt: skip
    others = [n for n, m in prepared.model.named_modules() if type(m) is nn.Linear and n not in prepared.scales]
    return {
        "quant_method": FORM, "format": layout(protocol), "quantization_status": "compressed", "config_groups": groups,
        "ignore": others,
    }  # fmt: skip


def _stored(parameter: Tensor) -> torch.dtype:
    return torch.bfloat16 if parameter.ndim >= 2 else torch.float32


@torch.no_grad()
def _round_kept(prepared: Prepared) -> None:
    """Round, in place, what is not quantised to what is stored, so that both sides of the check are one model."""
    linears = {id(linear.weight) for _, linear in prepared.linears()}
    for parameter in prepared.model.parameters():
        if id(parameter) not in linears:
            parameter.copy_(parameter.to(_stored(parameter)))


def _require_groups(prepared: Prepared, protocol: Protocol) -> None:
    group = protocol.weight_group
    for site, linear in prepared.linears():
        if group is not None and linear.in_features % group:
            raise ExportError(
                f"--to {FORM} has groups of one size, and {site.path} has {linear.in_features} inputs, no multiple of "
                f"{group}: choose another --weight-group, or none for a scale for each row."
            )


@torch.no_grad()
def _require_linears(prepared: Prepared, stock: nn.Module, ids: Tensor) -> None:
    """Raise VerificationError unless every linear makes the same of the same input, to a rounding tie or so.

    Whole models at 4-bit activations are hardly equal to themselves: one code that flips in a tie flips others after it.
    """
    stock(input_ids=ids, use_cache=False)  # its first forward unpacks the weights
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site, linear in prepared.linears():

            def keep(module: nn.Module, inputs: tuple[Tensor, ...], path: str = site.path) -> None:
                seen[path] = inputs[0]

            def check(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, path: str = site.path) -> None:
                theirs = stock.get_submodule(path)(seen.pop(path))
                error = ((theirs - output).norm() / output.norm()).item()
                if not error <= MOST_ERROR:
                    raise VerificationError(
                        f"transformers computes {path} otherwise: relative error {error:.4f} (limit {MOST_ERROR}). It was not "
                        "left behind."
                    )

            stack.callback(linear.register_forward_pre_hook(keep, prepend=True).remove)
            stack.callback(linear.register_forward_hook(check).remove)
        prepared.model(input_ids=ids, use_cache=False)


def _compared(prepared: Prepared, protocol: Protocol, directory: Path, windows: Tensor, place: Path) -> list[Row]:
    """transformers' reading against the model in memory, and that against the original. Raises VerificationError."""
    model, stock = prepared.model, load_stock(directory)
    with prepared.computing(protocol):
        _require_linears(prepared, stock, windows[:1, :-1])
        reading = compare(model, stock, windows)
        reading = reading.require("transformers' reading", cache(lambda: noise_floor(model, windows)))
    with prepared.computing(protocol):
        cost = compare(load(place).model, model, windows)
    return [Row("transformers", "the quantised model", reading), Row("the quantised model", "the original", cost)]
