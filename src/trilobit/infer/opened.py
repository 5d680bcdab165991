"""An ordinary checkpoint that is opened, not loaded: its structure without memory, and any rows of any tensor when they are
asked for.

    config.json ──▶ modules, parameters on meta, buffers (RoPE's angles) computed ──▶ structure()
    *.safetensors ──▶ get_slice(name)[start:stop], fp32 on the CPU                ──▶ rows(), tensors()

For ranks that each keep a part of a model which none of them could hold (train/original.py). What cannot be read so, because
transformers would do more to it than read it, is a NotOpened, and is loaded whole (load.py).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from trilobit.errors import ModelError
from trilobit.infer.foreign import bitnet_form
from trilobit.infer.hub import names_a_place, require_on_hub
from trilobit.infer.loaded import check_tokenizer, load_tokenizer
from trilobit.infer.quiet import clear_errors, quiet_transformers
from trilobit.infer.stored import CARD, read_tensor, tensor_files, tensor_shapes
from trilobit.storage import read_json

FILES = ["*.json", "*.safetensors"]  # of a repository on the hub


class NotOpened(ModelError):
    """Why a checkpoint cannot be read row by row. It may still be loaded whole."""


@dataclass(frozen=True)
class Opened:
    """model: of `structure`. places: of each of its parameters, a tied one once, the file and the name there."""

    model: PreTrainedModel
    tokenizer: Any
    places: dict[str, tuple[Path, str]]

    def structure(self) -> PreTrainedModel:
        """The model in eval mode, its parameters on meta, fp32, its buffers on the CPU as they are computed. A new one each
        time."""
        return copy.deepcopy(self.model)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a parameter, fp32 on the CPU. Raises ModelError if the file cannot be read any more."""
        path, stored = self.places[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_slice(stored)[start:stop].float()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, one after the other, whole."""
        for name, (path, stored) in self.places.items():
            yield name, read_tensor(path, stored).float()


def open_pretrained(source: str) -> Opened:
    """Open a full-precision checkpoint in safetensors, of a directory or the hub.

    Raises NotOpened, saying why, where reading its rows would not be loading it, and ModelError for what is no checkpoint.
    """
    directory = _directory(source)
    with clear_errors(source):
        config = AutoConfig.from_pretrained(directory)
        if bitnet_form(str(directory), config) is not None or _is_ternary(directory):
            raise NotOpened("it is ternary already")
        with init_empty_weights(include_buffers=False), no_init_weights(), quiet_transformers():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model.initialize_weights()  # buffers alone: of parameters there is nothing to fill
        model.tie_weights()
        if (directory / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    places = _places(directory, model)
    tokenizer = load_tokenizer(source)
    check_tokenizer(source, model, tokenizer)
    return Opened(model.eval(), tokenizer, places)


def _directory(source: str) -> Path:
    if names_a_place(source):
        if not (Path(source) / "config.json").is_file():
            raise NotOpened("it is no checkpoint directory")
        return Path(source)
    require_on_hub(source)
    with clear_errors(source):
        return Path(snapshot_download(source, allow_patterns=FILES))


def _is_ternary(directory: Path) -> bool:
    return (directory / CARD).exists() and read_json(directory / CARD).get("plan") is not None


def _places(directory: Path, model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """Where each parameter lies, by its own name or, of a tied one, by any of its names."""
    try:
        files = tensor_files(directory, "full precision")
        shapes = {n: s for file in sorted(set(files.values())) for n, s in tensor_shapes(directory / file).items()}
    except ModelError as error:
        raise NotOpened("it is not in safetensors that can be read") from error
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    if extra := sorted(model.state_dict().keys() - {name for alike in names.values() for name in alike}):
        raise NotOpened(f"it has buffers that are stored ({extra[0]})")
    places = {}
    for first, *others in names.values():
        there = [name for name in (first, *others) if name in shapes]
        if not there:
            raise NotOpened(f"its tensors have other names than its model's parameters ({first})")
        if shapes[there[0]] != tuple(model.get_parameter(first).shape):
            raise NotOpened(f"{first} has another shape than its model's")
        found = [(directory / files[name], name) for name in there]
        kept = read_tensor(*found[0]) if others else None
        if kept is not None and not all(torch.equal(kept, read_tensor(*other)) for other in found[1:]):
            raise NotOpened(f"{there[0]} and {there[1]} are one parameter, and stored as two")
        places[first] = found[0]
    return places
