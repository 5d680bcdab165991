"""Settings of `trilobit eval`."""

from dataclasses import dataclass
from typing import Literal

from trilobit.config.fields import Count, ModelPath
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a model: perplexity and bits per byte on a text (--data), benchmark scores through lm-eval (--tasks)."""

    model: ModelPath
    """Hub id, checkpoint directory or run directory."""
    data: str | None = None
    """Text: local files or globs, a hub id, or `stdlib` (its held-out part)."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and hub data."""
    sequence_length: int = 512
    """Tokens per window of the text. Windows do not overlap; each predicts all its tokens but the first."""
    sequences: int = 8
    """Sequences per forward pass: windows of the text, prompts of the benchmarks."""
    max_tokens: Count | None = None
    """Stop the text after this many predicted tokens, rounded down to whole windows. Default: the whole text."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Begin each window with the beginning-of-text token. auto: as the model's tokenizer does by itself."""
    tasks: str | None = None
    """Benchmarks, separated by commas: `five` (PIQA, ARC-e, ARC-c, HellaSwag, WinoGrande, without examples), `osp10` (the
    ten of outlier-safe pre-training), or lm-eval's names."""
    task_data: str | None = None
    """Directory with the benchmarks' files (.jsonl.gz): nothing is downloaded. Default: lm-eval's data sets on the hub."""
    shots: int | None = None
    """Solved examples in each prompt. Default: the suite's number, or the task's own."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    original: str | None = None
    """A second model, scored alike: how much of its score above chance is retained? Hub id or directory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision. For benchmarks, bf16 is the dtype of all that is not ternary."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""

    def __post_init__(self) -> None:
        if self.data is None and self.tasks is None:
            raise ConfigError("nothing to measure: give --data (perplexity on a text), --tasks (benchmarks) or both.")
        if self.sequence_length < 2:
            raise ConfigError(f"--sequence-length is {self.sequence_length}; it must be at least 2.")
        if self.sequences < 1:
            raise ConfigError(f"--sequences is {self.sequences}; it must be at least 1.")
        if self.shots is not None and self.shots < 0:
            raise ConfigError(f"--shots is {self.shots}; it must be at least 0.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}; it must be at least 1.")
        for name in ("task_data", "shots", "limit", "original"):
            if self.tasks is None and getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for benchmarks: it needs --tasks.")
