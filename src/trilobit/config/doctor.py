"""Settings of `trilobit doctor`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from trilobit.config.fields import require_threads
from trilobit.config.training import Gather, mesh_of
from trilobit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine computes with, why, how fast its memory is, and what would be faster; or, with --plan, what
    training a model on many GPUs takes."""

    HEADINGS: ClassVar[dict[str, str]] = {"plan": "plan"}

    threads: int | None = None
    """Threads to measure with. Default: one a core."""

    plan: str | None = None
    """Instead: memory, arithmetic and communication of training this model (a hub id or directory with a config.json, llama-3m
    to llama-1.4b, llama-8b, llama-70b), without its weights. Refused where it cannot fit."""
    gpus: int = 1
    """Of a plan: GPUs, eight to a machine."""
    gpu_memory: float = 80.0
    """Of a plan: GB of each GPU."""
    mesh: str = "auto"
    """Of a plan: as of `tune` and `pretrain`."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Of a plan."""
    optimizer_state: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of a plan: as of `tune` and `pretrain`."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Of a plan: likewise."""
    gather: Gather = "auto"
    """Of a plan: likewise."""
    offload: bool = False
    """Of a plan: likewise."""
    sequence_length: int = 4096
    """Of a plan: tokens per sequence."""
    sequences: int = 1
    """Of a plan: sequences per micro-batch of each GPU."""
    accumulation: int = 1
    """Of a plan: micro-batches per step."""
    recompute: bool = True
    """Of a plan: --activation-checkpointing."""
    teacher: bool = False
    """Of a plan: a bf16 original that is learned from (`tune`)."""

    def __post_init__(self) -> None:
        require_threads(self.threads)
        mesh_of(self.mesh)
        for name in ("gpus", "gpu_memory", "sequence_length", "sequences", "accumulation"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0.")
