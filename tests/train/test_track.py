import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trilobit.errors import ConfigError
from trilobit.train.track import PACKAGES, tracker

ROWS = [{"step": 1, "tokens": 64, "loss": 2.5, "note": "words"}, {"step": 2, "tokens": 128, "loss": 2.25}]


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if end == len(parts) or path not in sys.modules:
            module = ModuleType(path)
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def test_none_is_nowhere(tmp_path: Path) -> None:
    """Without --track nothing is imported or written."""
    with tracker(None, tmp_path, {}) as log:
        log(ROWS[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_is_said_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package, a tracker is a ConfigError that says what to install, before anything is written."""
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    match = rf"--track {kind} needs a package.*pip install 'trilobit\[track\]'"
    with pytest.raises(ConfigError, match=match), tracker(kind, tmp_path, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_numbers_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of a row is a scalar at its token count, in RUN/tensorboard, flushed row by row; words are left out."""
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str):
            written.append(folder)

        def add_scalar(self, name: str, value: float, at: int) -> None:
            written.append((name, value, at))

        def flush(self) -> None:
            written.append("flush")

        def close(self) -> None:
            written.append("close")

    fake(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    with tracker("tensorboard", tmp_path, {}) as log:
        assert written == [], "nothing may be written before the first row"
        for row in ROWS:
            log(row)
    first = [("step", 1, 64), ("tokens", 64, 64), ("loss", 2.5, 64), "flush"]
    second = [("step", 2, 128), ("tokens", 128, 128), ("loss", 2.25, 128), "flush"]
    assert written == [str(tmp_path / "tensorboard"), *first, *second, "close"]


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    """The real package, where it is installed, leaves an event file."""
    pytest.importorskip("tensorboard")
    with tracker("tensorboard", tmp_path, {}) as log:
        log(ROWS[0])
    assert list((tmp_path / "tensorboard").glob("events.out.*"))


@pytest.mark.parametrize(("kind", "on_session"), [("wandb", True), ("trackio", True), ("trackio", False)])
def test_sessions_are_opened_once_with_the_configuration(
    kind: str, on_session: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B and trackio get one session, named after the run, a call a row with its step, and an end even if training
    fails, wherever their functions live."""
    finished: list[str] = []
    sessions: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    def log(values: dict[str, Any], step: int) -> None:
        logged.append((values, step))

    def init(**settings: Any) -> SimpleNamespace:
        sessions.append(settings)
        return SimpleNamespace(**functions) if on_session else SimpleNamespace()

    functions: dict[str, Any] = {"log": log, "finish": lambda: finished.append(kind)}
    fake(monkeypatch, kind, init=init, **({} if on_session else functions))

    def train() -> None:
        with tracker(kind, tmp_path / "name", {"lr": 1.0}) as track:
            assert sessions == []
            for row in ROWS:
                track(row)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert finished == [kind]
    assert sessions == [{"project": "trilobit", "name": "name", "config": {"lr": 1.0}}]
    assert logged == [({"step": 1, "tokens": 64, "loss": 2.5}, 1), ({"step": 2, "tokens": 128, "loss": 2.25}, 2)]
