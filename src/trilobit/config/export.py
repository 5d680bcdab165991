"""Settings of `trilobit export`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from trilobit.config.fields import ModelPath


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a ternary model in the form that an engine reads."""

    model: ModelPath
    """Run directory, or a directory or hub id of a ternary model, trilobit's own or another's (`bitnet` in transformers)."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Directory to write. It must not exist."""
    to: Literal["native"] = "native"
    """native: packed for this package's CPU engine, ready as soon as it is mapped."""
    layout: Literal["auto", "two-bit", "base-3"] = "auto"
    """2 bits a weight, or 1.6, which is the faster one with AVX-512 VBMI. auto: what is faster here."""
    data: str | None = None
    """Text to compare the written model with the original on: files, a hub id or `stdlib`. Default: text sampled from it."""
