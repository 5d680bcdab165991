"""Everything a run needs to continue bit for bit: latents, optimizer state, step, random state. Safetensors and JSON only.

    checkpoints/step-N/   model.safetensors · optimizer.safetensors · state.json · manifest.json (sha256 of each)

The order of the data is a function of (seed, step), so the step is all that has to be remembered of it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trilobit.errors import ModelError
from trilobit.storage import (
    MANIFEST,
    atomic_directory,
    read_json,
    remove_directory,
    require_free_space,
    save_tensors,
    verify_manifest,
    write_json,
)  # fmt: skip

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
        state = _optimizer_tensors(model, optimizer)
        state["random_state"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state["random_state_cuda"] = torch.cuda.get_rng_state()
        save_tensors(state, directory / "optimizer.safetensors")
        write_json(directory / "state.json", vars(progress))
    for old in list_checkpoints(run)[:-keep]:
        remove_directory(old)
    return target


def list_checkpoints(run: Path) -> list[Path]:
    """Completely written checkpoints of `run`, oldest first. One that was damaged since is among them, to be refused."""
    found = [(int(m[1]), path) for path in run.glob("checkpoints/*") if (m := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).exists()]


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's state into `model` and `optimizer`, in place. Raises ModelError if a file is damaged."""
    try:
        verify_manifest(path)
    except ModelError as error:
        raise ModelError(f"{error} Remove {path} to continue from the checkpoint before it, if there is one.") from error
    tensors = load_file(path / "model.safetensors")
    targets = named_tensors(model)
    assert tensors.keys() == targets.keys(), sorted(tensors.keys() ^ targets.keys())[:4]
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    state = load_file(path / "optimizer.safetensors")
    torch.set_rng_state(state.pop("random_state"))
    if (cuda := state.pop("random_state_cuda", None)) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, field = key.rpartition(":")
        parameter = parameters[name]
        where = torch.device("cpu") if value.ndim == 0 and parameter.device.type == "cpu" else parameter.device
        optimizer.state[parameter][field] = value.to(where)
    return Progress(**read_json(path / "state.json"))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, each tied parameter once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {}
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state[parameter].items():
            assert isinstance(value, Tensor), (name, field, type(value))
            state[f"{name}:{field}"] = value
    return state
