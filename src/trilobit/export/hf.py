"""model/: the trained model as a directory that stock transformers loads, wherever its formats have words for it (forms.py).

Whatever form is chosen, the directory is read back by its real consumer before it is given its name, and compared with
the model in memory; one that differs is not left behind (transformers loads some wrong files with only a report).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit import __version__
from trilobit.errors import OutputError, VerificationError
from trilobit.export.exact import is_comparable, require_exact
from trilobit.export.forms import Store, choose_form, contents_of, kept_entries, require_form, stored_precision
from trilobit.export.source import Source
from trilobit.export.verify import Agreement, compare, load_stock, noise_floor
from trilobit.infer.hub import names_a_place
from trilobit.infer.stored import CARD, PACKED_FILE, read_ours
from trilobit.storage import atomic_directory, read_json, write_json
from trilobit.surgery.ternary import Plan
from trilobit.tensors import Entry, stream_tensors

PLACES = ("_name_or_path", "_model_name_or_path", "name_or_path")  # where transformers notes what was loaded


@dataclass(frozen=True)
class Written:
    """What was written: its form, why that form, its size, and how its consumer agrees with the model in memory (None if
    there is no consumer)."""

    path: str
    form: str
    reason: str
    bytes: int
    agreement: Agreement | None


def write_model(
    model: PreTrainedModel, plan: Plan, tokenizer: Any, target: Path, probe: Tensor, form: str = "auto", store: Store = "bf16"
) -> Written:
    """Write `model` (trained, λ = 1) to `target`, atomically, and check it on `probe` [N, W + 1] token windows.

    A form that its consumer reads differently (another argmax on more than 1.5 % of the positions, or perplexity by more
    than 0.1 %, and further off than the model's own noise floor: verify.py) is not left behind: bf16 gives way to fp32, a
    form chosen by `auto` to the packed one, and the reason says so. Raises VerificationError, leaving nothing, when none is
    left, and ConfigError if `form` cannot hold this model.
    """
    was_training = model.training
    model.eval()
    try:
        return write_source(Source(model, plan, tokenizer), model, target, probe, form, store)
    finally:
        model.train(was_training)


def write_source(
    source: Source, reference: nn.Module, target: Path, probe: Tensor, form: str = "auto", store: Store = "bf16"
) -> Written:
    """`write_model` of a model that may lie in a directory. reference: what it is compared with, the model or what was recorded
    of it."""
    chosen, reason = choose_form(source)
    if form != "auto":
        require_form(source, form)
        chosen, reason = form, "as asked"
    store = stored_precision(source, form, store)
    try:
        agreement = _write(source, reference, target, probe, chosen, store)
    except VerificationError as error:
        if store == "bf16":
            reason += "; stored in fp32, because bf16 embeddings changed the model too much"
        elif form == "auto" and chosen != "packed":
            chosen, reason = "packed", str(error).replace("It was not left behind.", "So it is stored in our own form.")
        else:
            raise
        agreement = _write(source, reference, target, probe, chosen, "fp32")
    if agreement.floor_top1 is not None:
        reason += (
            f"; read by transformers it has the same argmax at {agreement.top1:.2%} of the positions, and the model itself, "
            f"its embeddings changed in their last bits, at {agreement.floor_top1:.2%}"
        )
    return Written(str(target), chosen, reason, _weights_size(target), agreement)


def _weights_size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.suffix == ".safetensors")


def write_full_precision(
    model: PreTrainedModel, tokenizer: Any, target: Path, probe: Tensor,
    read: Callable[[str], Tensor] | None = None, reference: nn.Module | None = None,
) -> Written:  # fmt: skip
    """Write a model without surgery as an ordinary fp32 checkpoint, read back by transformers and compared.

    Of a model on meta, read gives its parameters by name, and reference is what was recorded of it.
    """
    with atomic_directory(target) as directory:
        stream_tensors(_parameters(model, read), directory)
        write_companions(directory, model, None, tokenizer, "full precision", {})
        agreement = compare(model.eval() if reference is None else reference, load_stock(directory), probe).require(
            "transformers' reading"
        )
    return Written(str(target), "full precision", "no surgery was made", _weights_size(target), agreement)


def _parameters(model: PreTrainedModel, read: Callable[[str], Tensor] | None) -> list[Entry]:
    """All of them in fp32, to be read one at a time."""
    get = read or model.get_parameter
    return [Entry(n, torch.float32, tuple(p.shape), partial(get, n)) for n, p in model.named_parameters()]


@torch.no_grad()
def round_kept(model: PreTrainedModel, plan: Plan, store: Store, tensors: Mapping[str, Tensor]) -> None:
    """Round, in place, the matrices outside the ternary modules to the precision `write_model` will store them in.

    Done before a finished model is measured, so that what is measured is what is stored. model: names and shapes; tensors: its
    parameters, or what this rank has of them.
    """
    for entry in kept_entries(Source(model, plan), store):
        if entry.dtype != torch.float32:
            tensors[entry.name].copy_(tensors[entry.name].to(entry.dtype))


def write_latent(
    model: PreTrainedModel, plan: Plan | None, tokenizer: Any, target: Path, read: Callable[[str], Tensor] | None = None
) -> None:
    """Write the trainable fp32 latents: what `trilobit.load` gives back for more training. Of a model on meta, read gives its
    parameters by name."""
    with atomic_directory(target) as directory:
        stream_tensors(_parameters(model, read), directory)
        write_companions(directory, model, plan, tokenizer, "latent" if plan else "full precision", {})


def _write(source: Source, reference: nn.Module, target: Path, probe: Tensor, form: str, store: Store) -> Agreement:
    with atomic_directory(target) as directory:
        write_form(source, directory, form, store)
        floor = cache(lambda: noise_floor(reference, probe))
        agreement = compare(reference, read_ours(directory).model, probe)
        agreement = agreement.require(f"trilobit's reading of the {form} form", floor)
        if form != "packed":
            stock = load_stock(directory)
            agreement = compare(reference, stock, probe)
            agreement = agreement.require(f"transformers' reading of the {form} form", floor)
            quantization = read_json(directory / "config.json").get("quantization_config", {})
            if is_comparable(source, quantization):
                require_exact(source, stock)
    return agreement


def write_form(source: Source, directory: Path, form: str, store: Store, **options: Any) -> None:
    """Tensors, config and tokenizer of one form into an existing directory, unchecked. options: of stream_tensors."""
    contents = contents_of(source, form, store)
    stem = (PACKED_FILE if form == "packed" else "model.safetensors").removesuffix(".safetensors")
    stream_tensors(contents.entries, directory, stem, **options)
    extra: dict[str, Any] = {"dtype": contents.dtype, **contents.card}
    if contents.quantization is not None:
        extra["quantization_config"] = contents.quantization
    write_companions(directory, source.model, source.plan, source.tokenizer, form, extra)


def write_companions(
    directory: Path, model: PreTrainedModel, plan: Plan | None, tokenizer: Any, form: str, content: dict[str, Any]
) -> None:
    """config.json, generation_config.json, tokenizer, and trilobit.json."""
    config = _without_places(model.config.to_dict())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = content.get("dtype", "float32")
    if "quantization_config" in content:
        config["quantization_config"] = content["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.generation_config is not None:
        # not save_pretrained: that refuses what many published checkpoints carry (a temperature without do_sample)
        model.generation_config.to_json_file(directory / "generation_config.json")
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library has no kind of its own for a full disk
        raise OutputError(f"cannot write the tokenizer to {directory.parent}: {error}. Nothing was left behind.") from error
    card = {"form": form, "plan": plan.to_json() if plan else None, "trilobit": __version__}
    write_json(directory / CARD, card | ({"norms": content["norms"]} if "norms" in content else {}))


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the names of directories on this machine; those of repositories stay."""
    kept = {key: value for key, value in config.items() if key not in PLACES or not names_a_place(str(value))}
    return {key: _without_places(value) if isinstance(value, dict) else value for key, value in kept.items()}
