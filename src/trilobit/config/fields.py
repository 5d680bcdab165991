"""Types shared by configurations, and how a command line spells them."""

import re
from fractions import Fraction
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from trilobit.errors import ConfigError

UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_count(text: str) -> int:
    """`12k`, `3M`, `1B`, `1.5M`, `4096` → a whole number ≥ 1. Raises ValueError otherwise."""
    match = re.fullmatch(r"(\d+|\d{1,3}(?:[,_]\d{3})+)(\.\d+)?([kmb]?)", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a count: write 4096, 12k, 3M or 1B")
    value = Fraction(re.sub("[,_]", "", match[1]) + (match[2] or "")) * UNITS[match[3].lower()]  # 1.001k is no float
    if value < 1 or value.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number ≥ 1")
    return int(value)


def require_seed(seed: int) -> None:
    """Raise ConfigError unless random generators take `seed`."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed is {seed}; it must be from 0 to 2⁶³ − 1.")


def require_threads(threads: int | None) -> None:
    """Raise ConfigError unless a pool of so many threads makes sense."""
    if threads is not None and not 1 <= threads <= 256:
        raise ConfigError(f"--threads is {threads}; it must be from 1 to 256.")


def format_count(value: int) -> str:
    """A short spelling that parse_count reads back: 12_000 → `12k`."""
    for unit in ("b", "m", "k"):
        if value >= UNITS[unit] and value % UNITS[unit] == 0:
            return f"{value // UNITS[unit]}{unit.upper() if unit != 'k' else unit}"
    return str(value)


Count = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [format_count(value)],
    ),
]
"""A number of tokens on the command line: `4096`, `12k`, `3M`, `1B`."""

Architecture = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ARCHITECTURE")]
"""A name of ours, a hub id, or a directory with a config.json."""

ModelPath = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
"""A hub id, a checkpoint directory, or a run directory."""
