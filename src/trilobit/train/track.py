"""Where else a run's numbers go on request: TensorBoard, Weights & Biases, trackio. log.jsonl is written regardless."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from trilobit.errors import ConfigError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def tracker(kind: str | None, run: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A function that logs one row. Raises ConfigError if the package is not installed."""
    if kind is None:
        return lambda row: None
    try:
        module = import_module(PACKAGES[kind])
    except ImportError as error:
        raise ConfigError(f"--track {kind} needs a package that is not installed: pip install 'trilobit[track]'.") from error
    if kind == "tensorboard":
        writer = module.SummaryWriter(str(run / "tensorboard"))

        def log_tensorboard(row: dict[str, Any]) -> None:
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["tokens"])
            writer.flush()

        return log_tensorboard
    session = module.init(project="trilobit", name=run.name, config=config)
    log = session.log if hasattr(session, "log") else module.log
    return lambda row: log(_numbers(row), step=row["step"])


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}
