"""Settings of `trilobit export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from trilobit.config.fields import ModelPath
from trilobit.config.quantize import Method, parse_bits
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a finished model for the software that runs it, and check what was written by running it there."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "layout": "native", "type": "gguf", "form": "hf", "bits": "compressed-tensors", "data": "checking and sharing",
    }  # fmt: skip

    model: ModelPath
    """Run directory, or a directory or hub id of a ternary model, trilobit's own or another's (`bitnet` in transformers)."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Directory to write; or, of gguf, a file that ends in .gguf. It must not exist."""
    to: Literal["native", "hf", "gguf", "bf16", "compressed-tensors"] = "native"
    """native: this package's CPU engine. hf: transformers, in two bits where its classes hold the model, else as bf16 does.
    gguf: llama.cpp and what is built on it. bf16: an ordinary checkpoint of code · scale (no inserted norms).
    compressed-tensors: a full-precision model in 2, 4 or 8 bits, for transformers and vLLM."""
    layout: Literal["auto", "two-bit", "base-3"] = "auto"
    """Of native: 2 bits a weight, or 1.6, which is the faster one with AVX-512 VBMI. auto: what is faster here."""
    type: Literal["auto", "tq1_0", "tq2_0", "q2_0", "f16", "bf16", "f32"] = "auto"
    """Of gguf, of the ternary matrices. auto: tq2_0, or q2_0 where a width is no multiple of 256, or f16 where none of 64."""
    head: Literal["auto", "q8_0", "q6_k", "f16", "f32"] = "auto"
    """Of gguf, of embedding and head. auto: q8_0, where the width is a multiple of 32; f16 for models that are not ternary."""
    form: Literal["auto", "autobitlinear", "bitlinear", "dense"] = "auto"
    """Of hf: the class that transformers loads it with. dense is what bf16 writes."""
    bits: str | None = None
    """Of compressed-tensors, as in `trilobit quantize`: W-A-KV, KV 16. Default: 4-16-16, or what a .json protocol says."""
    method: Method | None = None
    """Of compressed-tensors: rtn or gptq. Default: the protocol's."""
    weight_group: int | None = None
    """Of compressed-tensors: inputs that share a scale. Default: the protocol's, a whole row."""
    protocol: str | None = None
    """Of compressed-tensors: `osp`, or a .json file that has every knob. Default: osp."""
    calibration: str | None = None
    """Of compressed-tensors: text for GPTQ, as --data."""
    calibration_samples: int | None = None
    """Of compressed-tensors: sequences to calibrate on. Default: the protocol's."""
    calibration_length: int | None = None
    """Of compressed-tensors: tokens of each. Default: the protocol's."""
    data: str | None = None
    """Text to compare the written model with the original on: files, a hub id or `stdlib`. Default: text sampled from it."""
    push: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Upload what was written to this hub repository."""

    def __post_init__(self) -> None:
        owners = {"layout": "native", "type": "gguf", "head": "gguf", "form": "hf"}
        for name, owner in owners.items():
            if getattr(self, name) != "auto" and self.to != owner:
                raise ConfigError(f"--{name} is a choice of --to {owner}, not of --to {self.to}.")
        for name in ("bits", "method", "weight_group", "protocol", "calibration", "calibration_samples", "calibration_length"):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and self.to != "compressed-tensors":
                raise ConfigError(f"{flag} is a choice of --to compressed-tensors, not of --to {self.to}.")
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{flag} is {value}; it must be at least 1.")
        if self.push is not None and self.to == "gguf" and Path(self.out).suffix == ".gguf":
            raise ConfigError("--push uploads a directory: give --out a name without .gguf.")
        if self.bits is not None:
            parse_bits(self.bits)
