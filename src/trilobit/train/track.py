"""Where else a run's numbers go on request: TensorBoard, Weights & Biases, trackio. log.jsonl is written regardless."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from trilobit.errors import ConfigError

Track = Callable[[dict[str, Any]], None]
"""Takes one row of log.jsonl."""

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


@contextmanager
def tracker(kind: str | None, run: Path, config: dict[str, Any]) -> Iterator[Track]:
    """A function that logs one row; leaving the context ends the session. ConfigError if the package is not installed.

    Nothing is written or sent before the first row, so that this can be asked before anything else is done.
    """
    if kind is None:
        yield lambda row: None
        return
    try:
        module = import_module(PACKAGES[kind])
    except ImportError as error:
        raise ConfigError(f"--track {kind} needs a package that is not installed: pip install 'trilobit[track]'.") from error
    sessions: list[Any] = []  # one, from the first row on

    def log(row: dict[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if kind == "tensorboard":
            sessions[:] = sessions or [module.SummaryWriter(str(run / "tensorboard"))]
            for name, value in numbers.items():
                sessions[0].add_scalar(name, value, row["tokens"])
            sessions[0].flush()
        else:
            sessions[:] = sessions or [module.init(project="trilobit", name=run.name, config=config)]
            (getattr(sessions[0], "log", None) or module.log)(numbers, step=row["step"])

    try:
        yield log
    finally:
        for session in sessions:
            session.close() if kind == "tensorboard" else (getattr(session, "finish", None) or module.finish)()
