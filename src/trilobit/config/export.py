"""Settings of `trilobit export`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from trilobit.config.fields import ModelPath
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a finished model for the software that runs it, and check what was written by running it there."""

    model: ModelPath
    """Run directory, or a directory or hub id of a ternary model, trilobit's own or another's (`bitnet` in transformers)."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Directory to write. It must not exist."""
    to: Literal["native", "hf", "gguf", "bf16"] = "native"
    """native: this package's CPU engine. hf: transformers, in two bits where its classes hold the model, else as bf16 does.
    gguf: llama.cpp and what is built on it. bf16: an ordinary checkpoint of code · scale (no inserted norms)."""
    layout: Literal["auto", "two-bit", "base-3"] = "auto"
    """Of native: 2 bits a weight, or 1.6, which is the faster one with AVX-512 VBMI. auto: what is faster here."""
    type: Literal["auto", "tq1_0", "tq2_0", "q2_0", "f16", "bf16", "f32"] = "auto"
    """Of gguf, of the ternary matrices. auto: tq2_0, or q2_0 where a width is no multiple of 256, or f16 where none of 64."""
    head: Literal["auto", "q8_0", "q6_k", "f16", "f32"] = "auto"
    """Of gguf, of embedding and head. auto: q8_0, where the width is a multiple of 32; f16 for models that are not ternary."""
    form: Literal["auto", "autobitlinear", "bitlinear", "dense"] = "auto"
    """Of hf: the class that transformers loads it with. dense is what bf16 writes."""
    data: str | None = None
    """Text to compare the written model with the original on: files, a hub id or `stdlib`. Default: text sampled from it."""
    push: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Upload what was written to this hub repository."""

    def __post_init__(self) -> None:
        owners = {"layout": "native", "type": "gguf", "head": "gguf", "form": "hf"}
        for name, owner in owners.items():
            if getattr(self, name) != "auto" and self.to != owner:
                raise ConfigError(f"--{name} is a choice of --to {owner}, not of --to {self.to}.")
