"""Settings of `trilobit doctor`."""

from dataclasses import dataclass

from trilobit.config.fields import require_threads


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine computes with, why, how fast its memory is, and what would be faster."""

    threads: int | None = None
    """Threads to measure with. Default: one a core."""

    def __post_init__(self) -> None:
        require_threads(self.threads)
