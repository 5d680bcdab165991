"""Settings of `trilobit outliers`."""

from dataclasses import dataclass
from typing import Literal

from trilobit.config.fields import Count, ModelPath
from trilobit.errors import ConfigError

Protocol = Literal["contextual", "osp"]

SEQUENCES = 128
LENGTHS: dict[Protocol, int] = {"contextual": 512, "osp": 2048}


@dataclass(frozen=True, kw_only=True)
class OutliersConfig:
    """Does a model have activation outliers, where, and which channels and tokens carry them?"""

    model: ModelPath
    """Hub id, checkpoint directory or run directory."""
    data: str
    """Text: local files or globs, a hub id, or `stdlib` (its held-out part)."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and hub data."""
    protocol: Literal["contextual", "osp", "both"] = "contextual"
    """contextual: sequences as they are read, layer by layer and site by site, the first position apart. osp: the excess
    kurtosis of outlier-safe pre-training (arXiv 2506.19697), which measures every token alone, without a context."""
    sequence_length: int | None = None
    """Tokens per sequence. Default: 512; 2,048 for osp."""
    max_tokens: Count | None = None
    """Stop after this many tokens, rounded down to whole sequences, but one at least. Default: 128 sequences."""
    sequences: int = 4
    """Sequences per forward pass (contextual)."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Begin with the beginning-of-text token: each sequence, or the whole text (osp). auto: as the model's tokenizer does
    by itself."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """dtype of all that is not ternary, activations included. Published numbers of osp are of bf16 models."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""
    out: str | None = None
    """Directory for index.html, its pictures and outliers.json. It must not exist yet."""

    def __post_init__(self) -> None:
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ConfigError(f"--sequence-length is {self.sequence_length}; it must be at least 2.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-tokens is {self.max_tokens}; it must be at least 1.")
        if self.sequences < 1:
            raise ConfigError(f"--sequences is {self.sequences}; it must be at least 1.")

    def length(self, protocol: Protocol) -> int:
        """Tokens per sequence."""
        return LENGTHS[protocol] if self.sequence_length is None else self.sequence_length

    def windows(self, protocol: Protocol) -> int:
        """Most sequences to read, at least one."""
        return SEQUENCES if self.max_tokens is None else max(1, self.max_tokens // self.length(protocol))
