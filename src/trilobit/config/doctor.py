"""Settings of `trilobit doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine computes with, why, how fast its memory is, and what would be faster."""

    threads: int | None = None
    """Threads to measure with. Default: one a core."""
