"""Whole commands on several ranks, and what ranks agree on: jobs for tests/train/test_distributed.py."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trilobit.config.pretrain import PretrainConfig
from trilobit.config.tune import TuneConfig
from trilobit.errors import ConfigError, RankError
from trilobit.listener import Listener
from trilobit.train import pretrain, tune
from trilobit.train.meeting import open_team
from trilobit.train.mesh import arrangement_for
from trilobit.train.signals import Interrupted, Signals


class Notes(Listener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)


def commands(folder: Path, tuned: dict[str, Any], pretrained: dict[str, Any]) -> list[dict[str, Any]]:
    """`tune` and `pretrain`; the result of each and the notes that this rank gave."""
    found = []
    for module, config in ((tune, TuneConfig(**tuned)), (pretrain, PretrainConfig(**pretrained))):
        notes = Notes()
        found.append({"result": asdict(module.run(config, notes)), "notes": notes.heard})  # pyright: ignore
    return found


def agreements(folder: Path) -> dict[str, Any]:
    """Every way in which ranks come to one mind, errors included."""

    def fail(here: bool) -> str:
        if here:
            raise ConfigError("this cannot be.")
        return "fine"

    with open_team(torch.device("cpu"), Signals(), print) as team:
        last = team.rank == team.size - 1
        found: dict[str, Any] = {"shared": team.shared(lambda: {"rank": team.rank, "none": None})}
        for what, do in {
            "shared-error": lambda: team.shared(lambda: fail(True)),
            "together": lambda: team.together(lambda: fail(last)),
            "node-error": lambda: team.by_node(lambda: fail(team.local_rank == 0)),
        }.items():
            try:
                found[what] = do()
            except (ConfigError, RankError) as error:
                found[what] = f"{type(error).__name__}: {error}"
        found["agree"] = team.agree(team.rank, 3 - team.rank)
        found["sums"] = team.sums(1, 0.5 * team.rank)
        means = team.means({"a": torch.tensor(1.0 + team.rank), "b": torch.tensor(2.0, dtype=torch.float64)})
        found["means"] = [means["a"].item(), str(means["a"].dtype), means["b"].item()]
        if team.rank == 0:
            time.sleep(0.5)
        found["node"] = team.by_node(time.monotonic)
    return found


def twice(folder: Path) -> list[Any]:
    """What rank 0 shares in each of two runs of the same processes. It is slow to leave the first: the others begin the second
    while it has still to."""
    leave = dist.destroy_process_group
    found = []
    for run in (1, 2):
        with open_team(torch.device("cpu"), Signals(), print) as team:
            if team.rank == 0 and run == 1:
                dist.destroy_process_group = lambda: (time.sleep(1), leave())
            found.append(team.shared(lambda run=run: run))
        dist.destroy_process_group = leave
    return found


def early(folder: Path) -> dict[str, Any]:
    """What ranks do of which one is told to stop between two stages, and what they agree on where one has less memory."""
    stopped, arranged = [], ""
    for who in (0, 1):
        signals = Signals()
        try:
            with open_team(torch.device("cpu"), signals, print) as team:
                signals.number = 15 if team.rank == who else None
                team.stop_if_asked(signals)
        except Interrupted as stop:
            stopped.append(stop.number if stop.agreed else 0)
    with open_team(torch.device("cpu"), Signals(), print) as team:
        arranged = str(arrangement_for(team, "auto", parameters=1000, memory=33_000 if team.first else 31_000))
    return {"stopped": stopped, "arranged": arranged}
