"""Everything a run needs to continue bit for bit: latents, optimizer state, step, random state. Safetensors and JSON only.

    checkpoints/step-N/   model.safetensors · optimizer.safetensors · state.json · manifest.json (sha256 of each)
    of S ranks' rows      model-r-of-S.safetensors · optimizer-r-of-S.safetensors, r = 1 … S, instead (sharded_checkpoint.py)

Either is read by any number of ranks: each takes the rows it keeps from the files that have them. The order of the data is a
function of (seed, step), so the step is all that has to be remembered of it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trilobit.errors import ModelError
from trilobit.locks import remove_directory
from trilobit.storage import MANIFEST, atomic_directory, read_json, require_free_space, verify_manifest, write_json
from trilobit.tensors import save_tensors
from trilobit.train.adamw import AdamW
from trilobit.train.pieces import Piece, whole_pieces

RANDOM, RANDOM_CUDA = "random_state", "random_state_cuda"
BYTES_PER_PARAMETER = 12  # fp32 latent and two fp32 Adam moments


@dataclass
class Progress:
    """Where a run stands, after `step` updates."""

    step: int
    tokens: int
    seconds: float


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int) -> Path:
    """Write checkpoints/step-N of `run` and drop all but the newest `keep`."""
    target = run / "checkpoints" / f"step-{progress.step}"
    parameters = sum(p.numel() for p in model.parameters())
    require_free_space(target, BYTES_PER_PARAMETER * parameters, "A checkpoint")
    with atomic_directory(target) as directory:
        save_tensors(named_tensors(model), directory / "model.safetensors")
        state = optimizer_tensors(whole_pieces(model), optimizer)
        state[RANDOM] = torch.get_rng_state()
        if torch.cuda.is_available():
            state[RANDOM_CUDA] = torch.cuda.get_rng_state()
        save_tensors(state, directory / "optimizer.safetensors")
        write_json(directory / "state.json", vars(progress))
    drop_old(run, keep)
    return target


def drop_old(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in list_checkpoints(run)[:-keep]:
        remove_directory(old)


def list_checkpoints(run: Path) -> list[Path]:
    """Completely written checkpoints of `run`, oldest first. One that was damaged since is among them, to be refused."""
    found = [(int(m[1]), path) for path in run.glob("checkpoints/*") if (m := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).exists()]


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: list[Piece] | None = None,
    part: int = 0,
    parts: int = 1,
) -> Progress:
    """Put a checkpoint's state into `model` and `optimizer`, in place. Raises ModelError if a file is damaged.

    pieces: the rows that this rank keeps, of a model that is spread over several. part, parts: which of the files are verified
    here, as in storage.verify_manifest.
    """
    pieces = whole_pieces(model) if pieces is None else pieces
    try:
        verify_manifest(path, part, parts)
    except ModelError as error:
        raise ModelError(f"{error} Remove {path} to continue from the checkpoint before it, if there is one.") from error
    state = read_json(path / "state.json")
    shards = state.pop("shards", 1)
    saved, moments = (Saved(path, kind, shards) for kind in ("model", "optimizer"))
    names = {piece.name for piece in pieces}
    assert saved.names == names, sorted(saved.names ^ names)[:4]
    with torch.no_grad():
        for piece in pieces:
            piece.local.copy_(saved.rows(piece.name, piece))
    if RANDOM in moments.names:
        torch.set_rng_state(moments.rows(RANDOM, None))
    if RANDOM_CUDA in moments.names and torch.cuda.is_available():
        torch.cuda.set_rng_state(moments.rows(RANDOM_CUDA, None))
    by_name = {piece.name: piece for piece in pieces}
    for key in sorted(moments.names - {RANDOM, RANDOM_CUDA}):
        name, _, field = key.rpartition(":")
        piece = by_name[name]
        value = moments.rows(key, piece)
        value = value.to(piece.local.device)
        if isinstance(optimizer, AdamW) and field in optimizer.kept:
            value = optimizer.keep(value)
        optimizer.state[piece.local][field] = value
    return Progress(**state)


class Saved:
    """The tensors of one kind ("model", "optimizer") in a checkpoint, whichever files they lie in."""

    def __init__(self, path: Path, kind: str, shards: int):
        names = [f"{kind}.safetensors"] if shards == 1 else [shard_name(kind, rank, shards) for rank in range(shards)]
        self._files = [safe_open(path / name, framework="pt") for name in names]
        self._keys = [set(file.keys()) for file in self._files]
        self.names: set[str] = set().union(*self._keys)

    def rows(self, key: str, piece: Piece | None) -> Tensor:
        """The rows of `piece`, or all there are; of what has no rows (a count of steps), the whole."""
        there = [file for file, keys in zip(self._files, self._keys, strict=True) if key in keys]
        slices = [file.get_slice(key) for file in there]
        if piece is None or not slices[0].get_shape():
            return there[0].get_tensor(key)
        found, position = [], 0
        for part in slices:
            height = part.get_shape()[0]
            start, stop = (min(max(row - position, 0), height) for row in (piece.start, piece.stop))
            if start < stop or not found:
                found.append(part[start:stop])
            position += height
        assert position == piece.shape[0], (key, position, piece.shape)
        return torch.cat(found)


def shard_name(kind: str, rank: int, shards: int) -> str:
    return f"{kind}-{rank + 1:05}-of-{shards:05}.safetensors"


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, each tied parameter once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(pieces: list[Piece], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of each piece, as `name:field`."""
    if isinstance(optimizer, AdamW):
        optimizer.settle()
    state = {}
    for piece in pieces:
        for field, value in optimizer.state[piece.local].items():
            assert isinstance(value, Tensor), (piece.name, field, type(value))
            state[f"{piece.name}:{field}"] = value
    return state
