"""Models in: from a hub id, a checkpoint directory, or anything trilobit wrote.

A directory of trilobit's own is read by stored.py. Everything else goes through `AutoModelForCausalLM.from_pretrained`, and
what that would only warn about (weights that are missing, a tokenizer that does not match) is an error here. Ternary
checkpoints of others become our modules (foreign.py).
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trilobit.errors import ModelError
from trilobit.infer.foreign import adopt, bitnet_form, thaw
from trilobit.infer.gguf_model import read_gguf
from trilobit.infer.hub import names_a_place, require_on_hub
from trilobit.infer.loaded import Loaded, check_tokenizer, load_tokenizer
from trilobit.infer.quiet import clear_errors, quiet_transformers
from trilobit.infer.stored import CARD, freeze, read_ours
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.siblings import join_siblings
from trilobit.storage import read_json, verify_manifest

GGUF = ".gguf"


def load(source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Loaded:
    """Load whatever `source` names: a run directory, its model/ or latent/, a checkpoint directory, a hub id of either, or
    a .gguf file.

    latent/ gives trainable ternary modules, fp32 always; every other ternary form, trilobit's or another's, frozen ones.
    `dtype` is that of the activations between modules and of what is not ternary; ternary modules compute in fp32. Raises
    ModelError with what to do when the source is missing, gated, damaged, or is no language model.
    """
    path = _path(source)
    if path.suffix != GGUF and not path.exists() and (cached := _ours_on_hub(str(source))) is not None:
        path = cached
    if (path / "run.json").exists():
        if "result" not in read_json(path / "run.json"):
            raise ModelError(f"{path} is a run that has not finished: continue it with --resume.")
        path = next((path / name for name in ("model", "latent") if (path / name / CARD).exists()), path / "model")
    if (path / CARD).exists():
        verify_manifest(path)
        loaded = read_ours(path)
        if loaded.form != "latent":
            _cast_unquantised(loaded.model, dtype)
    else:
        loaded = load_pretrained(str(source), dtype)
    join_siblings(loaded.model)
    loaded.model.to(device).eval()  # pyright: ignore[reportArgumentType]
    return loaded


def locate(source: str) -> Path:
    """The directory that `source` names, which a hub id is copied to first. Raises ModelError."""
    path = _path(source)
    if names_a_place(source):
        return path
    require_on_hub(source)
    with clear_errors(source):
        return Path(snapshot_download(source))


def _path(source: str | Path) -> Path:
    """`source` as a path that can be asked whether it exists. Raises ModelError if it may not be looked at."""
    path = Path(source)
    try:
        path.exists()
    except OSError as error:  # a name that is too long, a folder without permission
        raise ModelError(f"{source} cannot be read: {error.strerror or error}.") from error
    return path


def _ours_on_hub(source: str) -> Path | None:
    """The local copy of a hub repository that trilobit wrote; None if it is another, or none can be reached."""
    if names_a_place(source) or source.count("/") != 1:
        return None
    require_on_hub(source)
    try:
        hf_hub_download(source, CARD)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):  # load_pretrained says what is wrong
        return None
    with clear_errors(source):
        return Path(snapshot_download(source))


def _cast_unquantised(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not part of a ternary module, nor codes. Parameters only: buffers hold RoPE's angles."""
    ternary = {id(p) for m in model.modules() if isinstance(m, PackedLinear | PackedEmbedding) for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ternary and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def load_pretrained(source: str, dtype: torch.dtype = torch.float32, *, trainable: bool = False) -> Loaded:
    """A checkpoint that is not ours: an ordinary one through transformers, or a ternary one (foreign.py).

    A ternary one gets frozen modules or, if `trainable`, fp32 latents whose function at λ = 1 is that of the stored model.
    Raises ModelError instead of guessing.
    """
    path = _path(source)
    if path.suffix == GGUF:
        return _loaded_gguf(path, dtype, trainable)
    if names_a_place(source):
        _require_checkpoint_directory(path)
        if (path / CARD).exists() and read_json(path / CARD).get("plan") is not None:
            raise ModelError(f"{source} is ternary already: trilobit wrote it. Start from the full-precision checkpoint.")
    else:
        require_on_hub(source)
    with clear_errors(source):
        config = AutoConfig.from_pretrained(source)
        form = bitnet_form(source, config)
        settings: dict[str, Any] = {"dtype": dtype} if form is None else {"dtype": torch.float32, "config": config}
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                source, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"the weights of {source} do not fit its config.json: {name} is {tuple(stored)}, not {tuple(expected)}."
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{source} lacks {len(missing)} of the model's weights ({missing[0]}, …): it is incomplete.")
    if form is not None and (odd := sorted(report["unexpected_keys"])):
        raise ModelError(f"{source} has {len(odd)} weights that its config.json gives no place ({odd[0]}, …).")
    tokenizer = load_tokenizer(source)
    check_tokenizer(source, model, tokenizer)
    if form is None:
        return Loaded(model, tokenizer, None, "full precision")
    with clear_errors(source):
        plan = adopt(model, form, source)
    if trainable:
        return Loaded(thaw(model.float(), plan), tokenizer, plan, form)
    _cast_unquantised(freeze(model), dtype)
    return Loaded(model.requires_grad_(False), tokenizer, plan, form)


def _loaded_gguf(path: Path, dtype: torch.dtype, trainable: bool) -> Loaded:
    if not path.is_file():
        raise ModelError(
            f"there is no file {path}. (One that lies on the hub is downloaded first: hf download REPOSITORY FILE.)"
        )
    model, tokenizer, plan = read_gguf(path)
    check_tokenizer(path, model, tokenizer)
    if trainable and plan is not None:
        thaw(model, plan)
    elif not trainable:
        _cast_unquantised(model, dtype)
    return Loaded(model.requires_grad_(trainable), tokenizer, plan, "gguf")


def _require_checkpoint_directory(path: Path) -> None:
    if not path.exists():
        raise ModelError(f"there is no {path}.")
    if not path.is_dir() or not (path / "config.json").exists():
        raise ModelError(f"{path} is not a checkpoint directory: it has no config.json.")
