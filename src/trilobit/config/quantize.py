"""Settings of `trilobit quantize`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from trilobit.config.fields import Count, require_seed
from trilobit.errors import ConfigError

Method = Literal["rtn", "gptq"]
Rotation = Literal["none", "ffn", "quarot", "spinquant"]

WIDTHS = (*range(2, 9), 16)
FULL = "16-16-16"
ROWS = (FULL, "4-8-16", "4-8-8", "4-4-16", "4-4-4")
"""Of --grid osp."""
TASK_BITS = "16-16-16,4-4-4"
SEQUENCE_LENGTH = 2048


def parse_bits(text: str) -> tuple[int, int, int, int]:
    """`W-A-KV` or `W-A-K-V` → bits of weights, activations, keys and values. Raises ConfigError."""
    parts = text.split("-")
    if len(parts) not in (3, 4) or not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"--bits {text} is not W-A-KV or W-A-K-V: write 4-4-4, or 4-8-4-8 for keys and values apart.")
    values = [int(part) for part in parts]
    for value in values:
        if value not in WIDTHS:
            raise ConfigError(f"--bits {text}: {value} is out of range. Each is from 2 to 8, or 16 for full precision.")
    return values[0], values[1], values[2], values[-1]


def format_bits(weights: int, activations: int, keys: int, values: int) -> str:
    """The shortest spelling that parse_bits reads back."""
    tail = f"{keys}" if keys == values else f"{keys}-{values}"
    return f"{weights}-{activations}-{tail}"


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What does a model lose at 4 bits? Fake-quantised evaluation by a protocol that pins every knob."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "data": "text", "bits": "protocol", "calibration": "calibration", "tasks": "benchmark", "precision": "hardware",
        "out": "output",
    }  # fmt: skip

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hub ids, checkpoint directories or run directories. Several with --grid."""
    data: str
    """Text that is measured: local files or globs, a hub id, or `stdlib` (its held-out part)."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and hub data."""
    sequence_length: int | None = None
    """Tokens per window of the text that is measured. Default: 2,048, or the model's positions if it has fewer."""
    sequences: int = 4
    """Sequences per forward pass."""
    max_tokens: Count | None = None
    """Stop the text after this many predicted tokens, rounded down to whole windows. Default: the whole text."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Begin each window with the beginning-of-text token. auto: as the model's tokenizer does by itself."""

    bits: str | None = None
    """Bits of weights, activations and KV cache, W-A-KV or W-A-K-V: each from 2 to 8, or 16 for full precision. Default: the
    protocol's, 4-4-4."""
    method: Method | None = None
    """rtn: round to nearest. gptq: column by column, errors paid for by the columns to come. Default: the protocol's."""
    rotate: Rotation | None = None
    """ffn: a Hadamard in front of the MLP's last linear. quarot: the residual stream and values as well. spinquant: the
    same with a learned residual rotation. Default: the protocol's."""
    protocol: str = "osp"
    """`osp` (outlier-safe pre-training), `quarot`, `spinquant`, or a .json file that has every knob."""
    grid: Literal["osp"] | None = None
    """The paper's table instead of one cell: five settings of --bits by RTN, + FFN Hadamard, + GPTQ, QuaRot, SpinQuant."""

    calibration: str | None = None
    """Text for GPTQ and SpinQuant, as --data. It must not be what is measured. Default: the protocol's, if it has one; the
    other part of `stdlib` where --data is stdlib."""
    calibration_samples: int | None = None
    """Sequences to calibrate on. Default: the protocol's."""
    calibration_length: int | None = None
    """Tokens of each. Default: the protocol's, or of one of ours the model's positions if it has fewer."""
    seed: int | None = None
    """Draws the calibration sequences and the random signs of rotations. Default: the protocol's, 0."""
    learning_steps: int | None = None
    """Of SpinQuant's rotation. Default: the protocol's 100, each on 8 calibration sequences: hours on a CPU."""

    tasks: str | None = None
    """Benchmarks, as in `trilobit eval`: `five`, `osp10`, or lm-eval's names."""
    task_data: str | None = None
    """Directory with the benchmarks' files. Default: lm-eval's data sets on the hub."""
    shots: int | None = None
    """Solved examples in each prompt. Default: the suite's number, or the task's own."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    generate_limit: int | None = None
    """The same for tasks whose answer is written freely, which are slow. Default: --limit."""
    task_bits: str = TASK_BITS
    """Rows of --grid that are asked the benchmarks, separated by commas."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """dtype of the model. Quantisation itself is fp32 arithmetic always. Published numbers are of bf16 models."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""

    out: str | None = None
    """Directory for records of cells, progress of GPTQ, and report/ with table, JSON, CSV and plot. It must not exist yet."""
    resume: bool = False
    """Continue in --out: what is there is not computed again."""

    def __post_init__(self) -> None:
        if self.bits is not None:
            parse_bits(self.bits)
        if not self.models:
            raise ConfigError("no MODEL is given: name at least one.")
        if self.grid is None and len(self.models) > 1:
            raise ConfigError(f"{len(self.models)} models are given: several are for --grid.")
        if len(set(self.models)) < len(self.models):
            raise ConfigError("a MODEL is given twice.")
        for name in ("bits", "method", "rotate"):
            if self.grid is not None and getattr(self, name) is not None:
                raise ConfigError(f"--grid {self.grid} has every --{name} of the table in it: leave it out.")
        if self.grid is not None and self.out is None:
            raise ConfigError(f"--grid {self.grid} takes long: give --out, so that it can be continued.")
        for row in self.task_rows() if self.grid is not None else ():
            if row not in ROWS:
                raise ConfigError(f"--task-bits {row} is no row of --grid {self.grid}: there are {', '.join(ROWS)}.")
        if self.grid is not None and self.tasks is not None and not self.task_rows():
            raise ConfigError("--task-bits names no row, so that --tasks would ask nothing. Leave one of them out.")
        for name in ("sequence_length", "calibration_length"):
            if (value := getattr(self, name)) is not None and value < 2:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 2.")
        for name in ("sequences", "calibration_samples", "learning_steps", "limit", "generate_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        if self.shots is not None and self.shots < 0:
            raise ConfigError(f"--shots is {self.shots}; it must be at least 0.")
        for name in ("task_data", "shots", "limit", "generate_limit"):
            if self.tasks is None and getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for benchmarks: it needs --tasks.")
        if self.resume and self.out is None:
            raise ConfigError("--resume continues in a directory: it needs --out.")
        if self.seed is not None:
            require_seed(self.seed)

    def task_rows(self) -> tuple[str, ...]:
        """The rows of --task-bits, each in its shortest spelling. Raises ConfigError."""
        return tuple(format_bits(*parse_bits(part.strip())) for part in self.task_bits.split(",") if part.strip())
