"""Settings of `trilobit eval`."""

from dataclasses import dataclass
from typing import Literal

from trilobit.config.fields import Count, ModelPath
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure perplexity and bits per byte of a model on a text."""

    model: ModelPath
    """Hub id, checkpoint directory or run directory."""
    data: str
    """Text: local files or globs, a hub id, or `stdlib` (its held-out part)."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and hub data."""
    sequence_length: int = 512
    """Tokens per window. Windows do not overlap; each predicts all its tokens but the first."""
    sequences: int = 8
    """Windows per forward pass."""
    max_tokens: Count | None = None
    """Stop after this many predicted tokens, rounded down to whole windows. Default: the whole text."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Begin each window with the beginning-of-text token. auto: as the model's tokenizer does by itself."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ConfigError(f"--sequence-length is {self.sequence_length}; it must be at least 2.")
        if self.sequences < 1:
            raise ConfigError(f"--sequences is {self.sequences}; it must be at least 1.")
