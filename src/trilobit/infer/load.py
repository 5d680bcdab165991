"""Models in: from a hub id, a checkpoint directory, or anything trilobit wrote.

A directory written by trilobit holds trilobit.json beside the weights: the form they are stored in and the surgery's plan.
Everything else goes through `AutoModelForCausalLM.from_pretrained`, and what that would only warn about (weights that are
missing, a tokenizer that does not match) is an error here. Ternary checkpoints of others become our modules (foreign.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)  # fmt: skip
from transformers.initialization import no_init_weights

from trilobit.errors import ModelError
from trilobit.formats import TwoBit
from trilobit.infer.foreign import adopt, bitnet_form, thaw, unpack
from trilobit.infer.gguf_model import read_gguf
from trilobit.infer.quiet import clear_errors, quiet_transformers
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear, TernaryModule
from trilobit.storage import read_json, verify_manifest
from trilobit.surgery.roles import vocabulary_size
from trilobit.surgery.ternary import Plan, apply_plan

CARD = "trilobit.json"
GGUF = ".gguf"
LOCAL_PREFIXES = (".", "/", "~", "out/")  # out/ is where runs are written by default: a misspelt one is no hub id
SMALL_GAIN = 2.0**-20  # what is left of a block gain that moved into the linears (export/forms.py)
PACKED_FILE = "packed.safetensors"  # not model.safetensors: stock software must refuse it, not half-read it


@dataclass
class Loaded:
    """A model, its tokenizer, and the plan of its surgery (None: an ordinary model)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    plan: Plan | None
    form: str


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
    loaded.model.to(device).eval()  # pyright: ignore[reportArgumentType]
    return loaded


def locate(source: str) -> Path:
    """The directory that `source` names, which a hub id is copied to first. Raises ModelError."""
    path = _path(source)
    if path.exists() or source.startswith(LOCAL_PREFIXES) or source.count("/") > 1:
        return path
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
    if source.startswith(LOCAL_PREFIXES) or source.count("/") != 1:
        return None
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
    local = path.exists() or source.startswith(LOCAL_PREFIXES) or source.count("/") > 1
    if local:
        _require_checkpoint_directory(path)
        if (path / CARD).exists() and read_json(path / CARD).get("plan") is not None:
            raise ModelError(f"{source} is ternary already: trilobit wrote it. Start from the full-precision checkpoint.")
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


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of `source`, without the truncation and padding that some tokenizer.json files carry."""
    with clear_errors(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if getattr(tokenizer, "is_fast", False):
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_tokenizer(source: str | Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise ModelError if the tokenizer can produce ids that the embedding does not have, or is not a fast one."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer (tokenizer.json).")
    vocabulary = vocabulary_size(model)
    # Added tokens beyond the embedding are common (Gemma 3, Code Llama) and harmless until a text contains one.
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    used = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    largest = max([*own, *used], default=0)
    if largest >= vocabulary:
        raise ModelError(
            f"the tokenizer of {source} does not match the model's vocabulary: it has an id {largest}, "
            f"but the embedding has {vocabulary} rows."
        )


def ternary_tensors(module: nn.Module) -> dict[str, Tensor]:
    """`codes` and `scale` of a packed module, ready to store: codes in the TwoBit layout."""
    assert isinstance(module, PackedLinear | PackedEmbedding), type(module)
    return {"codes": TwoBit.pack(module.codes), "scale": module.scale}


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, each trained ternary module by its frozen form."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TernaryLinear):
            model.set_submodule(name, PackedLinear.from_ternary(module))
        elif isinstance(module, TernaryEmbedding):
            model.set_submodule(name, PackedEmbedding.from_ternary(module))
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


def _require_checkpoint_directory(path: Path) -> None:
    if not path.exists():
        raise ModelError(f"there is no {path}.")
    if not path.is_dir() or not (path / "config.json").exists():
        raise ModelError(f"{path} is not a checkpoint directory: it has no config.json.")


def pick_device(name: str) -> torch.device:
    """`auto` → cuda where there is one, else cpu. Raises ModelError for a device that is not there, or of another kind."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # mps has no float64, which the scales are computed in; meta no numbers
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"--device {name} cannot be used here: {first}") from error
    return device
