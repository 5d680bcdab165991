"""Memory is asked for before hours of work begin, not found missing in the middle of them."""

from pathlib import Path

import torch

from trilobit.errors import ConfigError


def available(device: torch.device) -> int | None:
    """Bytes that are free on `device`; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_available(needed: int, device: torch.device, what: str, advice: str) -> None:
    """Raise ConfigError, `what` needs it and `advice` would help, if `device` has fewer than `needed` bytes free."""
    free = available(device)
    if free is not None and needed > free:
        raise ConfigError(f"{what}; {free / 1e9:.2f} GB are free. {advice}")
