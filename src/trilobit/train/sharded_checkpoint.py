"""A checkpoint of many ranks: each writes its own rows, while training goes on; rank 0 gives the directory its name.

    main thread, every rank    copies its rows to host memory, and goes on
    a thread, every rank       writes and flushes two files, tells the store their sha256
    a thread, rank 0           waits for all of them → state.json → manifest → rename → older ones removed → tells the store

The threads speak through the store alone and take part in no collective, so nothing they do can meet one of training's. A
checkpoint exists once the rename has happened; until then, whatever dies leaves the one before it. `settle` waits for the
outcome, and raises on every rank what went wrong on any. Host memory: one more copy of a rank's rows and moments.

The run's directory has to be the same for all ranks (a shared file system).
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trilobit.errors import OutputError, TrilobitError
from trilobit.storage import atomic_directory, flushed, require_free_space, write_json
from trilobit.tensors import save_tensors
from trilobit.train.checkpoint import (
    BYTES_PER_PARAMETER,
    Progress,
    drop_old,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    shard_name,
)
from trilobit.train.distributed import Ranks
from trilobit.train.mesh import Spread
from trilobit.train.pieces import Piece


class Checkpoints:
    """Where a run's state is kept between processes: whole, by rank 0, or each rank's rows by itself."""

    def __init__(self, run: Path, optimizer: torch.optim.Optimizer, spread: Spread, keep: int):
        self.run, self.optimizer, self.spread, self.keep = run, optimizer, spread, keep
        self.saver = None
        team, group = spread.team, spread.shard_group
        if group is not None:
            assert isinstance(team, Ranks)
            self.saver = ShardedSaver(team, run, spread.pieces, group.rank(), group.size(), spread.writes)

    def load(self) -> Progress:
        """The newest one's state, put in place; Progress(0, …) if there is none."""
        team, spread = self.spread.team, self.spread
        found = team.shared(lambda: [str(path) for path in list_checkpoints(self.run)])
        if not found:
            return Progress(0, 0, 0.0)
        path = Path(found[-1])
        return team.together(lambda: load_checkpoint(path, spread.model, self.optimizer, spread.pieces, team.rank, team.size))

    def save(self, progress: Progress) -> None:
        """Write one, or begin to: `settle` then says how it went."""
        self.align_copies()
        if self.saver is not None:
            self.saver.save(self.optimizer, progress, self.keep)
            return

        def write() -> None:
            if self.spread.team.first:
                save_checkpoint(self.run, self.spread.model, self.optimizer, progress, self.keep)

        self.spread.team.together(write)

    @torch.no_grad()
    def align_copies(self) -> None:
        """Where bits differ, give every copy of the model the first one's weights and moments, and say so. Copies share
        gradients and step for themselves: on unlike processors or kernels they would drift apart unseen."""
        pieces, group = self.spread.pieces, self.spread.copy_group
        if group is None or not pieces:
            return
        bits = sum(piece.local.reshape(-1).view(torch.int32).sum(dtype=torch.int64) for piece in pieces)
        ends = torch.stack([torch.as_tensor(bits), -torch.as_tensor(bits)])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
        if ends[0] == -ends[1]:
            return
        for piece in pieces:
            state = self.optimizer.state.get(piece.local, {})
            for tensor in (piece.local.detach(), *(state[field] for field in sorted(state) if state[field].ndim)):
                there = tensor.to(piece.local.device)  # of moments in the host's memory a copy
                dist.broadcast(there, dist.get_global_rank(group, 0), group=group)
                tensor.copy_(there)
        team = self.spread.team
        if group.rank() == 0 and isinstance(team, Ranks):
            team.signals.say(
                "the ranks' copies of the weights had drifted apart; all go on with the first (--mesh fsdp has one)"
            )

    def settle(self) -> None:
        if self.saver is not None:
            self.saver.settle()


class ShardedSaver:
    """Saves pieces of one run, one checkpoint at a time."""

    def __init__(self, team: Ranks, run: Path, pieces: list[Piece], shard: int, shards: int, writes: bool):
        """shard of shards: which rows these are. writes: whether this rank's are the ones that are kept, and not a further
        copy's."""
        self.team, self.run, self.pieces = team, run, pieces
        self.shard, self.shards, self.writes = shard, shards, writes
        self._thread: threading.Thread | None = None
        self._key = ""

    def save(self, optimizer: torch.optim.Optimizer, progress: Progress, keep: int) -> None:
        """Begin to write checkpoints/step-N. Raises OutputError on every rank if the one before failed, or has no room."""
        self.settle()
        self._key = self.team.key("checkpoint")
        target = self.run / "checkpoints" / f"step-{progress.step}"

        def require_room() -> None:
            if self.team.first:
                size = sum(piece.shape.numel() for piece in self.pieces)
                require_free_space(target, BYTES_PER_PARAMETER * size, "A checkpoint")

        self.team.together(require_room)
        tensors: dict[str, dict[str, Tensor]] = {}
        if self.writes:
            tensors["model"] = {piece.name: piece.local for piece in self.pieces}
            tensors["optimizer"] = optimizer_tensors(self.pieces, optimizer)
            tensors = {kind: {name: _copy(t) for name, t in found.items() if t.numel()} for kind, found in tensors.items()}
        if self.team.first:
            self._begin(self._whole, target, tensors, vars(progress) | {"shards": self.shards}, keep)
        elif self.writes:
            self._begin(self._part, tensors)

    def _begin(self, do: Callable[..., None], *arguments: Any) -> None:
        self._thread = threading.Thread(target=do, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until what was begun is written, on every rank, and raise OutputError if it is not."""
        if not self._key:
            return
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcome = self.team.wait_calmly(f"{self._key}/outcome").decode()
        self._key = ""
        if outcome:
            raise OutputError(outcome)

    def _part(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """On a rank that is not the first: write into rank 0's directory, and report."""
        key = self._key
        directory = self.team.wait_calmly(f"{key}/directory").decode()
        if directory:  # else rank 0 could not make one, and says why
            self.team.store.set(f"{key}/part/{self.shard}", json.dumps(self._write(Path(directory), tensors)))

    def _write(self, directory: Path, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Manifest entries of this rank's files, or the error that there was."""
        try:
            if not directory.is_dir():
                raise OutputError(
                    f"rank {self.team.rank} does not see {directory}: --out must be on a file system of all ranks."
                )
            entries = {}
            for kind, found in tensors.items():
                path = directory / shard_name(kind, self.shard, self.shards)
                save_tensors(found, path)
                entries[path.name] = flushed(path)
            return {"files": entries}
        except BaseException as error:  # whatever it is, the others wait to hear of it
            return {"error": _said(error)}

    def _whole(self, target: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> None:
        """On rank 0: the directory, its own part, everybody's reports, the commit."""
        key, store, outcome, told = self._key, self.team.store, "", False
        known: dict[str, dict[str, Any]] = {}
        try:
            with atomic_directory(target, known) as directory:
                store.set(f"{key}/directory", str(directory.absolute()))
                told = True
                reports = [self._write(directory, tensors)]
                for shard in range(self.shards):
                    if shard != self.shard:
                        reports.append(json.loads(self.team.wait_calmly(f"{key}/part/{shard}")))
                for report in reports:
                    if "error" in report:
                        raise OutputError(report["error"])
                    known |= report["files"]
                write_json(directory / "state.json", state)
            drop_old(self.run, keep)
        except BaseException as error:
            outcome = _said(error)
        if not told:
            store.set(f"{key}/directory", "")
        store.set(f"{key}/outcome", outcome)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError | TrilobitError) and str(error) else f"{type(error).__name__}: {error}"


def _copy(tensor: Tensor) -> Tensor:
    """On the host, whatever training does to the original meanwhile."""
    return tensor.detach().to("cpu", copy=True)
