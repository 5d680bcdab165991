"""The forms that a model is stored in for transformers: which one holds it, and the tensors of each.

    placement      scale       activations  cover         form
    every          tensor      int8         projections   autobitlinear (or bitlinear), use_rms_norm
    none           tensor      int8         projections   autobitlinear (or bitlinear)
    output         tensor      int8         projections   the same, where every other linear reads a block norm directly:
                                                          the block gain moves into the linear's own rms_norm
    none           any         none         any           dense: code · s as ordinary weights
    everything else                                       packed: trilobit's own, refused by stock software

`autobitlinear` multiplies by weight_scale (s), and its bias with it (so bias/s is stored); `bitlinear` divides by it (1/s).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilobit import quant
from trilobit.errors import ConfigError, VerificationError
from trilobit.export.source import Source
from trilobit.formats import Bitnet, TwoBit
from trilobit.infer.stored import SMALL_GAIN
from trilobit.tensors import Entry

Form = Literal["autobitlinear", "bitlinear", "dense", "packed"]
Store = Literal["bf16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Contents:
    """Tensors of a form in the order they are written, the dtype that config.json names, and for the bitnet classes their
    quantization_config and whether norms are everywhere."""

    entries: list[Entry]
    dtype: str
    quantization: dict[str, Any] | None = None
    card: dict[str, Any] = field(default_factory=dict)


def choose_form(source: Source) -> tuple[Form, str]:
    """The form that says most to stock software, and why."""
    plan = source.plan
    assert plan is not None
    obstacle = bitnet_obstacle(source)
    if obstacle is None:
        return "autobitlinear", "stock transformers holds it exactly"
    normed = any(linear.normed for linear in plan.linears.values())
    if plan.spec.activations == "none" and not normed and not plan.spec.dead_zone_bias:
        return "dense", "weights only and no inserted norms: stock transformers runs it as an ordinary model"
    return "packed", f"stock transformers has no words for it: {obstacle}"


def bitnet_obstacle(source: Source) -> str | None:
    """Why transformers' bitnet classes cannot hold this model; None if they can."""
    plan = source.plan
    assert plan is not None
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
        outputs = source.model.get_submodule(path).out_features
        if not Bitnet.fits(outputs):  # pyright: ignore[reportArgumentType]
            return f"outputs must be a multiple of 4, {path} has {outputs}"
    normed = [linear.normed for linear in plan.linears.values()]
    if any(normed) and not all(normed):
        for path, linear in plan.linears.items():
            if not linear.normed and linear.fed_by is None:
                return f"norms everywhere or nowhere, and {path} does not read a block norm whose gain could move into it"
            if linear.fed_by is not None and not linear.normed:
                try:
                    _moved_gain(source, path, linear.fed_by)
                except VerificationError:
                    return f"norms everywhere or nowhere, and {linear.fed_by} is no RMSNorm whose gain could move into {path}"
    return None


def require_form(source: Source, form: str) -> None:
    """Raise ConfigError if `form` (a --model-format) cannot hold the model."""
    if form == "dense" and choose_form(source)[0] != "dense":
        raise ConfigError("--model-format dense holds weights-only models without inserted norms, and this is not one.")
    if form.endswith("bitlinear") and (obstacle := bitnet_obstacle(source)):
        raise ConfigError(f"--model-format {form} cannot hold this model: {obstacle}.")


def stored_precision(source: Source, form: str, store: Store) -> Store:
    """The precision embeddings and head really get. transformers leaves tensors of a quantised checkpoint in the dtype they
    are stored in, and cannot multiply fp32 activations by a bf16 head: its bitnet classes get fp32 throughout."""
    chosen = choose_form(source)[0] if form == "auto" else form
    return "fp32" if chosen.endswith("bitlinear") else store


def contents_of(source: Source, form: str, store: Store) -> Contents:
    """The tensors of a form."""
    writers: dict[str, Callable[[Source, str, Store], Contents]] = {
        "autobitlinear": _bitnet, "bitlinear": _bitnet, "dense": _dense, "packed": _packed,
    }  # fmt: skip
    return writers[form](source, form, store)


def kept_entries(source: Source, store: Store) -> list[Entry]:
    """Parameters outside the ternary modules: matrices (embedding, head) in `store`, the rest in fp32."""
    entries = []
    for name in source.kept_names:
        shape = tuple(source.model.get_parameter(name).shape)
        dtype = DTYPES[store] if len(shape) >= 2 else torch.float32
        entries.append(Entry(name, dtype, shape, lambda name=name: source.kept(name)))
    return entries


def _bitnet(source: Source, form: str, store: Store) -> Contents:
    """transformers' `bitlinear` and `autobitlinear` (offline) classes."""
    plan = source.plan
    assert plan is not None
    kept = {entry.name: entry for entry in kept_entries(source, store)}
    entries = []
    everywhere = any(linear.normed for linear in plan.linears.values())
    multiplies = form == "autobitlinear"
    for path, planned in plan.linears.items():
        module: Any = source.model.get_submodule(path)
        outputs, inputs = module.out_features, module.in_features

        def scale(path: str = path) -> Tensor:
            return source.packed(path).scale.reshape(1).float()

        def add(name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor], path: str = path) -> None:
            entries.append(Entry(f"{path}.{name}", dtype, shape, read))

        add("weight", torch.uint8, (outputs // 4, inputs), lambda p=path: Bitnet.pack(source.packed(p).codes))
        add("weight_scale", torch.float32, (1,), lambda s=scale: s() if multiplies else s().reciprocal())
        if source.has_bias(path):

            def bias(path: str = path, scale: Callable[[], Tensor] = scale) -> Tensor:
                own: Any = source.packed(path).bias  # pyright: ignore
                return own / (scale() if multiplies else 1.0)

            add("bias", torch.float32, (outputs,), bias)
        if planned.normed:
            add("rms_norm.weight", torch.float32, (inputs,), lambda p=path, n=inputs: source.gain(p).expand(n))
        elif everywhere:
            norm = planned.fed_by
            assert norm is not None, path
            add("rms_norm.weight", torch.float32, (inputs,), lambda p=path, n=norm: _moved_gain(source, p, n)[0])
            kept[f"{norm}.weight"] = Entry(
                f"{norm}.weight", torch.float32, (inputs,), lambda p=path, n=norm: _moved_gain(source, p, n)[1]
            )
    quantization = {
        "quant_method": "bitnet",
        "linear_class": form,
        "quantization_mode": "offline",
        "use_rms_norm": everywhere,
        "rms_norm_eps": plan.spec.eps,
        "modules_to_not_convert": [n for n, m in source.model.named_modules() if type(m) is nn.Linear],
    }
    norms = {"norms": "everywhere" if everywhere else "nowhere"}
    return Contents([*kept.values(), *entries], "float32", quantization, norms)


def _moved_gain(source: Source, path: str, norm: str) -> tuple[Tensor, Tensor]:
    assert source.plan is not None
    module: Any = source.model.get_submodule(path)
    return movable_gain(source.norm(norm), module.in_features, source.plan.spec.eps)


def movable_gain(norm: nn.Module, width: int, eps: float) -> tuple[Tensor, Tensor]:
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


def dense_entries(source: Source, store: Store) -> list[Entry]:
    """Every matrix as code · s, and what is not ternary."""
    entries = kept_entries(source, store)
    for path, shape, tied in _ternary_shapes(source):
        if tied:
            continue

        def weight(path: str = path) -> Tensor:
            packed = source.packed(path)
            return quant.ternary_dequantize(packed.codes, packed.scale, packed.granularity)

        entries.append(Entry(f"{path}.weight", DTYPES[store], shape, weight))
        if _has_bias(source, path):
            entries.append(Entry(f"{path}.bias", DTYPES["fp32"], shape[:1], lambda p=path: source.packed(p).bias))  # pyright: ignore
    return entries


def _dense(source: Source, form: str, store: Store) -> Contents:
    return Contents(dense_entries(source, store), "bfloat16" if store == "bf16" else "float32")


def _packed(source: Source, form: str, store: Store) -> Contents:
    plan = source.plan
    assert plan is not None
    entries = kept_entries(source, store)
    for path, (outputs, inputs), tied in _ternary_shapes(source):
        if not tied:
            group = quant.group_size(plan.spec.scale)
            scales = {"tensor": (1, 1), "row": (outputs, 1)}.get(plan.spec.scale, (outputs, -(-inputs // (group or 1))))
            codes_shape = (outputs, -(-inputs // 4))
            entries.append(Entry(f"{path}.codes", torch.uint8, codes_shape, lambda p=path: TwoBit.pack(source.packed(p).codes)))
            entries.append(Entry(f"{path}.scale", torch.float32, scales, lambda p=path: source.packed(p).scale))
        if _has_bias(source, path):
            entries.append(Entry(f"{path}.bias", torch.float32, (outputs,), lambda p=path: source.packed(p).bias))  # pyright: ignore
        if path in plan.linears and plan.linears[path].normed:
            width = 1 if plan.spec.gain == "scalar" else inputs
            entries.append(Entry(f"{path}.rms_norm.weight", torch.float32, (width,), lambda p=path: source.gain(p)))
    return Contents(entries, "float32")


def _ternary_shapes(source: Source) -> list[tuple[str, tuple[int, int], bool]]:
    """Path, [O, K], and whether it is the head that shares the embedding's matrix, of every ternary module."""
    found = []
    for path, module in source.ternary.items():
        table = hasattr(module, "num_embeddings")
        shape = (module.num_embeddings, module.embedding_dim) if table else (module.out_features, module.in_features)  # pyright: ignore
        assert source.plan is not None
        found.append((path, shape, path == source.plan.head and source.plan.tied))
    return found


def _has_bias(source: Source, path: str) -> bool:
    return not hasattr(source.ternary[path], "num_embeddings") and source.has_bias(path)
