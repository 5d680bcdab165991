"""Where else a run's numbers go on request: TensorBoard, Weights & Biases, trackio. log.jsonl is written regardless."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from trilobit.errors import ConfigError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def tracker(kind: str | None, run: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A function that logs one row. Raises ConfigError if the package is not installed.

    Nothing is written or sent before the first row, so that this can be asked before anything else is done.
    """
    if kind is None:
        return lambda row: None
    try:
        module = import_module(PACKAGES[kind])
    except ImportError as error:
        raise ConfigError(f"--track {kind} needs a package that is not installed: pip install 'trilobit[track]'.") from error
    if kind == "tensorboard":
        writer = cache(lambda: module.SummaryWriter(str(run / "tensorboard")))

        def log_tensorboard(row: dict[str, Any]) -> None:
            for name, value in _numbers(row).items():
                writer().add_scalar(name, value, row["tokens"])
            writer().flush()

        return log_tensorboard
    session = cache(lambda: module.init(project="trilobit", name=run.name, config=config))

    def log_session(row: dict[str, Any]) -> None:
        log = getattr(session(), "log", None) or module.log
        log(_numbers(row), step=row["step"])

    return log_session


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}
