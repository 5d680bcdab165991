"""Settings of `trilobit pretrain`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from trilobit.config.fields import Architecture, Count
from trilobit.config.training import TrainingConfig
from trilobit.errors import ConfigError

LEAST_VOCABULARY = 257  # every byte and the end of text


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Train a model that grows no activation outliers (arXiv 2506.19697), from random weights."""

    HEADINGS: ClassVar[dict[str, str]] = {"tokenizer": "model", **TrainingConfig.HEADINGS}
    INSTEAD: ClassVar[dict[str, str]] = {"tokenizer": "train_tokenizer", "train_tokenizer": "tokenizer"}
    """A flag takes the place of another that a recipe or a record set."""

    architecture: Architecture
    """Hub id or directory with a config.json, or one of ours: llama-3m, llama-60m, llama-135m, llama-1.4b. A recipe of a size
    (osp-3m) brings its own."""
    tokenizer: str | None = None
    """Hub id or directory of a tokenizer. Default: the architecture's, if it has one."""
    train_tokenizer: Count | None = None
    """Instead, make a byte-level BPE of so many entries of the text."""

    ssnorm: bool = True
    """Every RMSNorm has one scale instead of a gain per channel."""
    embproj: bool = True
    """Learnable projections after the embedding and before the head, which are untied. They are folded away at the end."""
    tie: Literal["auto", "yes", "no"] = "auto"
    """Whether the head is the embedding's matrix. auto: as the architecture has it, and never with --embproj."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon for the matrices inside the decoder layers and the embedding projections and AdamW for the rest (one rate for
    both), or AdamW for everything."""
    lr: float | None = None
    """Peak learning rate. Default: 0.4 / hidden size, but 3e-3 at most."""
    decay: Literal["cosine", "wsd"] = "wsd"
    """After warm-up: warmup-stable-decay (linear to zero over the last --decay-fraction), or a cosine to zero."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == "self":
            raise ConfigError("--data self: there is no model yet that text could be sampled from.")
        if self.tie == "yes" and self.embproj:
            raise ConfigError("--tie yes: embedding projections need two matrices: add --no-embproj (--recipe ssnorm).")
        if self.tokenizer is not None and self.train_tokenizer is not None:
            raise ConfigError("--tokenizer and --train-tokenizer are two answers to one question: give one of them.")
        if self.sequence_length < 2:
            raise ConfigError(f"--sequence-length is {self.sequence_length}; it must be at least 2.")
        if self.train_tokenizer is not None and self.train_tokenizer < LEAST_VOCABULARY:
            raise ConfigError(f"--train-tokenizer is {self.train_tokenizer}; it must be at least {LEAST_VOCABULARY}.")
