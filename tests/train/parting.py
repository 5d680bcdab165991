"""What the ranks of tests/train/test_parts.py do: whole commands without their training, and what they hold meanwhile."""

import ctypes
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.commands import Notes
from trilobit.config.pretrain import PretrainConfig
from trilobit.config.tune import TuneConfig
from trilobit.listener import Listener
from trilobit.train import pretrain, tune
from trilobit.train.checkpoint import Progress
from trilobit.train.loop import autocast, fit
from trilobit.train.mesh import Shards
from trilobit.train.signals import Interrupted


def begun(
    model: Any, windows: Any, objective: Any, config: Any, peak_lr: float, run: Path, device: Any, *more: Any
) -> Progress:
    """In place of `fit`: nothing is trained. What the first step would find at λ = 1 is left in run/losses.json."""
    _, hooks, spread = more
    hooks.before_step(config.max_tokens)
    spread.model.eval()
    with torch.no_grad(), autocast(config.precision, device):
        losses = objective(windows.samples(0, 2).to(device))
    spread.rest()
    if spread.team.first:
        found = {name: value.item() for name, value in asdict(losses).items() if value is not None}
        (run / "losses.json").write_text(json.dumps(found))
        (run / "log.jsonl").write_text("")
    return Progress(config.steps, config.max_tokens, 1.0)


def without_training(folder: Path, tuned: list[dict[str, Any]], pretrained: list[dict[str, Any]]) -> list[list[str]]:
    """Runs whose `fit` is `begun`; the notes of each on this rank."""
    said = []
    own = [(module, name, getattr(module, name)) for module, name in PATCHED]
    try:
        for module, name, _ in own:
            setattr(module, name, begun if name == "fit" else lambda *_: None)
        for module, kind, all_settings in ((tune, TuneConfig, tuned), (pretrain, PretrainConfig, pretrained)):
            for settings in all_settings:
                notes = Notes()
                module.run(kind(**settings), notes)
                said.append(notes.heard)
    finally:
        for module, name, before in own:
            setattr(module, name, before)
    return said


PATCHED: list[tuple[Any, str]] = [
    (tune, "fit"), (tune, "plot_loss"), (tune, "plot_strengths"), (tune, "plot_flips"), (pretrain, "fit"),
    (pretrain, "plot_loss"), (pretrain, "plot_kurtosis"),
]  # fmt: skip


class Stopping(Listener):
    """A signal at the end of the second step."""

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class Rows(Notes):
    """Keeps the numbers of the steps that it hears of as well."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def row(self, row: dict[str, Any], max_tokens: int) -> None:
        self.steps.append(row["step"])


def continued(folder: Path, tuned: list[dict[str, Any]], pretrained: list[dict[str, Any]]) -> list[tuple[list[str], list[int]]]:
    """Runs of which every second one is stopped after two steps and goes on; of those, the notes on this rank, and
    the step of the checkpoint with those that followed."""
    said = []
    for module, kind, all_settings in ((tune, TuneConfig, tuned), (pretrain, PretrainConfig, pretrained)):
        straight, broken = (kind(**settings) for settings in all_settings)
        module.run(straight)
        try:
            module.run(broken, Stopping())
            raise AssertionError("the signal did not stop it")
        except Interrupted:
            pass
        kept = [path.name for path in (Path(broken.out or "") / "checkpoints").iterdir()]
        assert kept in (["step-2"], ["step-3"]), "the step in progress is finished"
        going_on = Rows()
        module.run(replace(broken, resume=True), going_on)
        said.append((going_on.heard, [int(kept[0][5:]), *going_on.steps]))
    return said


MMAP_THRESHOLD = -3  # of glibc's mallopt


def anonymous() -> int:
    """Bytes of this process' memory that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("Linux says how much memory a process has")


class Peak:
    """The most that this process has had, above what it had, from entering to leaving; looked at every few milliseconds."""

    def __enter__(self) -> "Peak":
        self.base, self.most, self._done = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, anonymous() - self.base)
            time.sleep(0.002)

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()


def held(folder: Path, tuned: dict[str, Any]) -> dict[str, Any]:
    """The most that this rank holds from the start of `tune` until it trains, and the most bytes of whole parameters at once
    that rank 0 was given. Loading a model whole is an error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a rank loads the whole model")

    found: dict[str, Any] = {"given": 0}
    alive: list[Any] = []
    received: Callable[..., Tensor] = Shards._received

    def counted(self: Shards, piece: Any) -> Tensor:
        whole = received(self, piece)
        alive[:] = [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(whole))
        found["given"] = max(found["given"], sum(t().nbytes for t in alive if t() is not None))
        return whole

    def until_here(*arguments: Any) -> Any:
        before.__exit__()
        found["start"] = before.most
        return fit(*arguments)

    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once, or it would be counted on
    Shards._received, tune.fit = counted, until_here
    tune.load_pretrained = refuse
    with Peak() as before:
        tune.run(TuneConfig(**tuned), Notes())
    return found
