"""model/: the trained model as a directory that stock transformers loads, wherever its formats have words for it.

    placement      scale       activations  cover         form
    every          tensor      int8         projections   autobitlinear (or bitlinear), use_rms_norm
    none           tensor      int8         projections   autobitlinear (or bitlinear)
    output         tensor      int8         projections   the same, where every other linear reads a block norm directly:
                                                          the block gain moves into the linear's own rms_norm
    none           any         none         any           dense: code · s as ordinary weights
    everything else                                       packed: trilobit's own, refused by stock software

`autobitlinear` multiplies by weight_scale (s), and its bias with it (so bias/s is stored); `bitlinear` divides by it (1/s).
Whatever form is chosen, the directory is read back by its real consumer before it is given its name, and compared with
the model in memory; one that differs is not left behind (transformers loads some wrong files with only a report).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit import __version__, quant
from trilobit.errors import ConfigError, OutputError, VerificationError
from trilobit.export.verify import Agreement, compare, load_stock, noise_floor
from trilobit.formats import Bitnet
from trilobit.infer.load import CARD, PACKED_FILE, read_ours, ternary_tensors
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear
from trilobit.storage import atomic_directory, save_tensors, write_json
from trilobit.surgery.ternary import Plan

Form = Literal["autobitlinear", "bitlinear", "dense", "packed"]
Store = Literal["bf16", "fp32"]
SMALL_GAIN = 2.0**-20
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Written:
    """What was written: its form, why that form, its size, and how its consumer agrees with the model in memory (None if
    there is no consumer)."""

    path: str
    form: str
    reason: str
    bytes: int
    agreement: Agreement | None


def choose_form(plan: Plan, model: nn.Module) -> tuple[Form, str]:
    """The form that says most to stock software, and why."""
    obstacle = bitnet_obstacle(plan, model)
    if obstacle is None:
        return "autobitlinear", "stock transformers holds it exactly"
    normed = any(linear.normed for linear in plan.linears.values())
    if plan.spec.activations == "none" and not normed and not plan.spec.dead_zone_bias:
        return "dense", "weights only and no inserted norms: stock transformers runs it as an ordinary model"
    return "packed", f"stock transformers has no words for it: {obstacle}"


def bitnet_obstacle(plan: Plan, model: nn.Module) -> str | None:
    """Why transformers' bitnet classes cannot hold this model; None if they can."""
    spec = plan.spec
    if spec.scale != "tensor":
        return f"one scale per matrix only, this model has one per {spec.scale}"
    if spec.activations != "int8":
        return "activations are int8 always, this model's are not quantised"
    if plan.head is not None or plan.embedding is not None:
        return "embeddings and lm_head cannot be ternary"
    if spec.dead_zone_bias:
        return "the dead zone adds a bias to every linear"
    for path in plan.linears:
        outputs = model.get_submodule(path).out_features
        if not Bitnet.fits(outputs):  # pyright: ignore[reportArgumentType]
            return f"outputs must be a multiple of 4, {path} has {outputs}"
    normed = [linear.normed for linear in plan.linears.values()]
    if any(normed) and not all(normed):
        for path, linear in plan.linears.items():
            if not linear.normed and linear.fed_by is None:
                return f"norms everywhere or nowhere, and {path} does not read a block norm whose gain could move into it"
            if linear.fed_by is not None and not linear.normed:
                try:
                    _movable_gain(model.get_submodule(linear.fed_by), model.get_submodule(path).in_features, spec.eps)  # pyright: ignore[reportArgumentType]
                except VerificationError:
                    return f"norms everywhere or nowhere, and {linear.fed_by} is no RMSNorm whose gain could move into {path}"
    return None


def require_form(plan: Plan, model: nn.Module, form: str) -> None:
    """Raise ConfigError if `form` (a --model-format) cannot hold the model that `plan` makes of `model`."""
    if form == "dense" and choose_form(plan, model)[0] != "dense":
        raise ConfigError("--model-format dense holds weights-only models without inserted norms, and this is not one.")
    if form.endswith("bitlinear") and (obstacle := bitnet_obstacle(plan, model)):
        raise ConfigError(f"--model-format {form} cannot hold this model: {obstacle}.")


def stored_precision(plan: Plan, model: nn.Module, form: str, store: Store) -> Store:
    """The precision embeddings and head really get. transformers leaves tensors of a quantised checkpoint in the dtype they
    are stored in, and cannot multiply fp32 activations by a bf16 head: its bitnet classes get fp32 throughout."""
    chosen = choose_form(plan, model)[0] if form == "auto" else form
    return "fp32" if chosen.endswith("bitlinear") else store


def write_model(
    model: PreTrainedModel, plan: Plan, tokenizer: Any, target: Path, probe: Tensor, form: str = "auto", store: Store = "bf16"
) -> Written:
    """Write `model` (trained, λ = 1) to `target`, atomically, and check it on `probe` [N, W + 1] token windows.

    A form that its consumer reads differently (another argmax on more than 1.5 % of the positions, or perplexity by more
    than 0.1 %, and further off than the model's own noise floor: verify.py) is not left behind: bf16 gives way to fp32, a
    form chosen by `auto` to the packed one, and the reason says so. Raises VerificationError, leaving nothing, when none is
    left, and ConfigError if `form` cannot hold this model.
    """
    chosen, reason = choose_form(plan, model)
    if form != "auto":
        require_form(plan, model, form)
        chosen, reason = form, "as asked"
    store = stored_precision(plan, model, form, store)
    was_training = model.training
    model.eval()
    try:
        try:
            agreement = _write(model, plan, tokenizer, target, probe, chosen, store)
        except VerificationError as error:
            if store == "bf16":
                reason += "; stored in fp32, because bf16 embeddings changed the model too much"
            elif form == "auto" and chosen != "packed":
                chosen, reason = "packed", str(error).replace("It was not left behind.", "So it is stored in our own form.")
            else:
                raise
            agreement = _write(model, plan, tokenizer, target, probe, chosen, "fp32")
    finally:
        model.train(was_training)
    if agreement.floor_top1 is not None:
        reason += (
            f"; read by transformers it has the same argmax at {agreement.top1:.2%} of the positions, and the model itself, "
            f"its embeddings changed in their last bits, at {agreement.floor_top1:.2%}"
        )
    size = sum(file.stat().st_size for file in target.iterdir() if file.suffix == ".safetensors")
    return Written(str(target), chosen, reason, size, agreement)


def write_full_precision(model: PreTrainedModel, tokenizer: Any, target: Path, probe: Tensor) -> Written:
    """Write a model without surgery as an ordinary fp32 checkpoint, read back by transformers and compared."""
    with atomic_directory(target) as directory:
        save_tensors({n: p.detach() for n, p in model.named_parameters()}, directory / "model.safetensors")
        write_companions(directory, model, None, tokenizer, "full precision", {})
        agreement = compare(model.eval(), load_stock(directory), probe).require("transformers' reading")
    size = (target / "model.safetensors").stat().st_size
    return Written(str(target), "full precision", "no surgery was made", size, agreement)


@torch.no_grad()
def round_kept(model: PreTrainedModel, plan: Plan, store: Store) -> None:
    """Round, in place, the matrices outside the ternary modules to the precision `write_model` will store them in.

    Done before a finished model is measured, so that what is measured is what is stored.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in _kept_tensors(model, plan, store).items():
        parameters[name].copy_(tensor)


def write_latent(model: PreTrainedModel, plan: Plan | None, tokenizer: Any, target: Path) -> None:
    """Write the trainable fp32 latents: what `trilobit.load` gives back for more training."""
    with atomic_directory(target) as directory:
        save_tensors({n: p.detach() for n, p in model.named_parameters()}, directory / "model.safetensors")
        write_companions(directory, model, plan, tokenizer, "latent" if plan else "full precision", {})


def _write(
    model: PreTrainedModel, plan: Plan, tokenizer: Any, target: Path, probe: Tensor, form: str, store: Store
) -> Agreement:
    writers: dict[str, Callable[..., dict[str, Any]]] = {
        "autobitlinear": _bitnet_tensors, "bitlinear": _bitnet_tensors, "dense": _dense_tensors, "packed": _packed_tensors,
    }  # fmt: skip
    with atomic_directory(target) as directory:
        content = writers[form](model, plan, form, store)
        save_tensors(content.pop("tensors"), directory / (PACKED_FILE if form == "packed" else "model.safetensors"))
        write_companions(directory, model, plan, tokenizer, form, content)
        floor = cache(lambda: noise_floor(model, probe))
        agreement = compare(model, read_ours(directory).model, probe)
        agreement = agreement.require(f"trilobit's reading of the {form} form", floor)
        if form != "packed":
            agreement = compare(model, load_stock(directory), probe)
            agreement = agreement.require(f"transformers' reading of the {form} form", floor)
    return agreement


def _bitnet_tensors(model: PreTrainedModel, plan: Plan, form: str, store: Store) -> dict[str, Any]:
    """Tensors and quantization_config of transformers' `bitlinear` and `autobitlinear` (offline) classes."""
    tensors = _kept_tensors(model, plan, store)
    everywhere = any(linear.normed for linear in plan.linears.values())
    for path, planned in plan.linears.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, TernaryLinear), (path, type(linear))
        packed = PackedLinear.from_ternary(linear)
        scale = packed.scale.reshape(1)
        tensors[f"{path}.weight"] = Bitnet.pack(packed.codes)
        tensors[f"{path}.weight_scale"] = scale if form == "autobitlinear" else scale.reciprocal()
        if linear.bias is not None:
            tensors[f"{path}.bias"] = linear.bias.detach() / (scale if form == "autobitlinear" else 1.0)
        if linear.rms_norm is not None:
            tensors[f"{path}.rms_norm.weight"] = linear.rms_norm.weight.detach().expand(linear.in_features)
        elif everywhere:
            assert planned.fed_by is not None, path
            gain, neutral = _movable_gain(model.get_submodule(planned.fed_by), linear.in_features, plan.spec.eps)
            tensors[f"{path}.rms_norm.weight"] = gain
            tensors[f"{planned.fed_by}.weight"] = neutral
    quantization = {
        "quant_method": "bitnet",
        "linear_class": form,
        "quantization_mode": "offline",
        "use_rms_norm": everywhere,
        "rms_norm_eps": plan.spec.eps,
        "modules_to_not_convert": [n for n, m in model.named_modules() if type(m) is nn.Linear],
    }
    return {
        "tensors": tensors,
        "quantization_config": quantization,
        "norms": "everywhere" if everywhere else "nowhere",
        "dtype": "float32",
    }


def _movable_gain(norm: nn.Module, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """The gain of the rms_norm that takes over a block norm's, and the weight the block norm is left with.

    A second norm after a block norm whose gain is c returns c·u / sqrt(c²·mean(u²) + eps), where u is x normalised. With
    c = 1 that undoes the block norm's own epsilon, which shows where the residual is small (first layers, unscaled
    embeddings). With c² far below eps the root is a constant: the second norm multiplies by its gain and no more.
    Norms that apply 1 + w keep c = 1: their weight could not hold a small c in bf16. Which kind a norm is, is measured.
    """
    weight = norm.weight
    assert isinstance(weight, Tensor)
    small = SMALL_GAIN
    plain = (weight, torch.full_like(weight, small), math.sqrt(small**2 + eps) / small)
    for gain, left, factor in (plain, (weight + 1, torch.zeros_like(weight), 1.0)):
        with torch.no_grad():
            applied = norm(torch.full((1, width), 1e4, device=weight.device, dtype=torch.float32)).reshape(-1)
            if torch.allclose(applied, gain, rtol=1e-5, atol=1e-7):
                return gain.detach() * factor, left
    raise VerificationError(f"{type(norm).__name__} applies its gain in a way that is not known; nothing was written.")


def _dense_tensors(model: PreTrainedModel, plan: Plan, form: str, store: Store) -> dict[str, Any]:
    tensors = _kept_tensors(model, plan, store)
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear | TernaryEmbedding) and not (name == plan.head and plan.tied):
            if isinstance(module, TernaryLinear):
                weight = quant.ternary_dequantize(*module.quantized(), module.rule.granularity)
            else:
                weight = quant.ternary_quantize(module.weight, module.granularity)
            tensors[f"{name}.weight"] = weight.to(DTYPES[store])
            if isinstance(module, TernaryLinear) and module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.detach()
    return {"tensors": tensors, "dtype": "bfloat16" if store == "bf16" else "float32"}


def _packed_tensors(model: PreTrainedModel, plan: Plan, form: str, store: Store) -> dict[str, Any]:
    tensors = _kept_tensors(model, plan, store)
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            packed = PackedLinear.from_ternary(module)
            if not (name == plan.head and plan.tied):
                tensors |= {f"{name}.{key}": value for key, value in ternary_tensors(packed).items()}
            if packed.bias is not None:
                tensors[f"{name}.bias"] = packed.bias
            if module.rms_norm is not None:
                tensors[f"{name}.rms_norm.weight"] = module.rms_norm.weight.detach()
        elif isinstance(module, TernaryEmbedding):
            embedding = PackedEmbedding.from_ternary(module)
            tensors |= {f"{name}.{key}": value for key, value in ternary_tensors(embedding).items()}
    return {"tensors": tensors, "dtype": "float32"}


def _kept_tensors(model: PreTrainedModel, plan: Plan, store: Store) -> dict[str, Tensor]:
    """Parameters outside the ternary modules: matrices (embedding, head) in `store`, the rest in fp32."""
    ternary = [n for n, m in model.named_modules() if isinstance(m, TernaryLinear | TernaryEmbedding)]
    return {
        name: parameter.detach().to(DTYPES[store] if parameter.ndim >= 2 else torch.float32)
        for name, parameter in model.named_parameters()
        if not any(name.startswith(f"{path}.") for path in ternary)
    }


def write_companions(
    directory: Path, model: PreTrainedModel, plan: Plan | None, tokenizer: Any, form: str, content: dict[str, Any]
) -> None:
    """config.json, generation_config.json, tokenizer, and trilobit.json."""
    config = model.config.to_dict()
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
