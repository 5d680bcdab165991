"""What trilobit has written, read back: trilobit.json, and tensors in one of the forms it names.

A directory of ours holds trilobit.json beside the weights: the form they are stored in and the surgery's plan. Which directory
a name stands for is found out in load.py.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from trilobit.errors import ModelError
from trilobit.formats import TwoBit
from trilobit.infer.foreign import unpack
from trilobit.infer.loaded import Loaded, load_tokenizer
from trilobit.infer.quiet import clear_errors, quiet_transformers
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.siblings import join_siblings
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear, TernaryModule
from trilobit.storage import read_json
from trilobit.surgery.ternary import Plan, apply_plan

CARD = "trilobit.json"
SMALL_GAIN = 2.0**-20  # what is left of a block gain that moved into the linears (export/forms.py)
PACKED_FILE = "packed.safetensors"  # not model.safetensors: stock software must refuse it, not half-read it


def ternary_tensors(module: nn.Module) -> dict[str, Tensor]:
    """`codes` and `scale` of a packed module, ready to store: codes in the TwoBit layout."""
    assert isinstance(module, PackedLinear | PackedEmbedding), type(module)
    return {"codes": TwoBit.pack(module.codes), "scale": module.scale}


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, each trained ternary module by its frozen form; those that read the same input know of each other."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TernaryLinear):
            model.set_submodule(name, PackedLinear.from_ternary(module))
        elif isinstance(module, TernaryEmbedding):
            model.set_submodule(name, PackedEmbedding.from_ternary(module))
    join_siblings(model)
    return model


def read_ours(path: Path) -> Loaded:
    """Load a directory that holds trilobit.json, whether or not it has its manifest yet (`load` insists on it)."""
    card = read_json(path / CARD)
    form = card["form"]
    if form == "native":
        raise ModelError(
            f"{path} is written for the native engine: generate, chat and bench run it. Take the run it came from."
        )
    plan = Plan.from_json(card["plan"]) if card["plan"] else None
    tokenizer = load_tokenizer(path)
    with clear_errors(str(path)):
        if plan is None or form == "dense":
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            return Loaded(model, tokenizer, plan, form)
        config = AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with no_init_weights(), quiet_transformers():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if (path / "generation_config.json").exists():  # where some checkpoints keep further end-of-text tokens
                model.generation_config = GenerationConfig.from_pretrained(path)
        model.tie_weights()
    if form != "latent" and card.get("norms") == "everywhere":
        plan = with_every_norm(plan)
    apply_plan(model, plan)
    tensors = {name: read_tensor(path / file, name) for name, file in tensor_files(path, form).items()}
    if form == "latent":
        _assign(model, tensors, path)
        return Loaded(model, tokenizer, plan, form)
    for name, module in list(model.named_modules()):
        if isinstance(module, TernaryModule):
            if name == plan.head and plan.tied and plan.embedding is not None:
                shared = model.get_submodule(plan.embedding)
                tensors |= {f"{name}.{key}": value for key, value in ternary_tensors(shared).items()}
            try:
                model.set_submodule(name, packed_module(module, name, tensors, form))
            except KeyError as error:
                raise ModelError(f"{path} does not hold the tensors its {CARD} promises: {error} is missing.") from error
    _assign(model, tensors, path)
    model.requires_grad_(False)
    return Loaded(model, tokenizer, plan, form)


def with_every_norm(plan: Plan) -> Plan:
    """The plan of a model whose block gains were moved into norms of its own (export/hf.py): every linear has one."""
    linears = {path: type(linear)(True, linear.role, linear.fed_by) for path, linear in plan.linears.items()}
    return Plan(plan.spec, linears, plan.embedding, plan.head, plan.tied)


def packed_module(module: TernaryModule, name: str, tensors: dict[str, Tensor], form: str) -> nn.Module:
    """The frozen form of `module` from the stored tensors, which are taken out of `tensors`."""
    if form == "packed":
        width = module.embedding_dim if isinstance(module, TernaryEmbedding) else module.in_features  # pyright: ignore
        codes, scale = TwoBit.unpack(tensors.pop(f"{name}.codes"), int(width)), tensors.pop(f"{name}.scale")  # pyright: ignore
        if isinstance(module, TernaryEmbedding):
            return PackedEmbedding(codes, scale, module.granularity)
    assert isinstance(module, TernaryLinear), type(module)
    norm = module.rms_norm
    if norm is not None:
        norm.weight = nn.Parameter(tensors.pop(f"{name}.rms_norm.weight").float())
    bias = tensors.pop(f"{name}.bias", None)
    if form != "packed":
        codes, scale = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.weight_scale")
        return unpack(codes, scale, bias, norm, form, name)  # pyright: ignore[reportArgumentType]
    return PackedLinear(codes, scale, bias, norm, module.rule.granularity, module.rule.int8_activations)


def _assign(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy what is left of `tensors` into the model's parameters; each tied parameter once; nothing may be left over."""
    packed = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, PackedLinear) for k, _ in m.named_parameters()}
    wanted = {name: p for name, p in model.named_parameters() if name not in packed}
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise ModelError(f"{path} does not hold the tensors its {CARD} promises: {odd[0]}, … ({len(odd)} differ).")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def tensor_files(path: Path, form: str) -> dict[str, str]:
    """Names of the tensors of a stored model, and the file that each is in. Raises ModelError."""
    stem = (PACKED_FILE if form == "packed" else "model.safetensors").removesuffix(".safetensors")
    index = path / f"{stem}.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ModelError(f"{index} is damaged: it does not say in which file of its directory each tensor is.")
        return files
    file = f"{stem}.safetensors"
    try:
        with safe_open(path / file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path / file} cannot be read: {error}") from error


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a safetensors file, by name. Raises ModelError."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file. Raises ModelError."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
