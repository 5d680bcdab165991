"""What generate and chat share: the model, how tokens are chosen, what they are computed on."""

from dataclasses import dataclass
from typing import Literal

from trilobit.config.fields import ModelPath, require_seed, require_threads
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where a model runs."""

    model: ModelPath
    """Hub id, checkpoint directory, run directory, or a directory written by `trilobit export`."""
    engine: Literal["auto", "native", "transformers"] = "auto"
    """The native engine (ternary models on a CPU) or transformers. auto: native where it runs the model."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, … A GPU means transformers."""
    threads: int | None = None
    """Threads of the native engine. Default: one a core."""
    instructions: str | None = None
    """Instruction set of the native engine (`trilobit doctor` lists them). Default: the fastest of this processor."""
    cache: Literal["bf16", "int8"] = "bf16"
    """How the native engine keeps keys and values."""
    verify: bool = False
    """Compare a native file with its checksums before it is used."""

    def __post_init__(self) -> None:
        require_threads(self.threads)
        if self.engine == "native" and self.device not in ("auto", "cpu"):
            raise ConfigError(f"--engine native runs on the CPU, not on --device {self.device}.")


@dataclass(frozen=True, kw_only=True)
class RunningConfig(EngineConfig):
    """How text is generated."""

    temperature: float = 0.0
    """0: always the likeliest token. Above: sampling."""
    top_k: int = 0
    """Sample from so many likeliest tokens. 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this probability."""
    min_p: float = 0.0
    """Leave out tokens with less than this fraction of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens that are there already by this, and multiply negative ones."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed(self.seed)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}; it must be 0 or above.")
        if self.top_k < 0:
            raise ConfigError(f"--top-k is {self.top_k}; it must be 0 or above.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"--min-p is {self.min_p}; it must be from 0 to 1.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"--repetition-penalty is {self.repetition_penalty}; it must be above 0.")
