"""Ternary checkpoints that others wrote, in transformers' `bitnet` format: the same function in modules of our own.

    linear_class    mode      stored                        becomes
    bitlinear       offline   codes, weight_scale = 1/s     PackedLinear(codes, 1/weight_scale, bias)
    autobitlinear   offline   codes, weight_scale = s       PackedLinear(codes, s, s · bias): it multiplies the bias, too
    autobitlinear   online    latent weights                TernaryLinear: quantised in every forward, also there

Which linears are meant, under which names they are stored, and what lies where in the directory is transformers' own
decision: it loads the checkpoint, and its quantised modules are replaced one by one. Packed weights are loaded as `bitlinear`
whichever class they are of, because that class keeps them packed: `autobitlinear` would unpack them to fp32. Embeddings,
norms and head are the checkpoint's own, also the norms inside BitNet's attention and MLP; its quantiser is quant.py's.
"""

import copy
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trilobit.errors import ModelError
from trilobit.formats import Bitnet
from trilobit.infer.quiet import quiet_transformers
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import InputRMSNorm, TernaryEmbedding, TernaryLinear
from trilobit.surgery.roles import Site, decoder_layers, find_sites
from trilobit.surgery.ternary import NORM_EPS, Plan, PlannedLinear, TernarySpec

Form = Literal["bitlinear", "autobitlinear", "online"]
TERNARY = (PackedLinear, TernaryLinear)
MODULES = (*TERNARY, PackedEmbedding, TernaryEmbedding)
PROBE_VOCABULARY, PROBE_HIDDEN = 16, 64


def bitnet_form(source: str, config: PretrainedConfig) -> Form | None:
    """Which of the three `source` is, None if it is not quantised; its config then asks transformers for packed modules.

    Raises ModelError for other ways of quantising.
    """
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = dict(settings if isinstance(settings, dict) else settings.to_dict())
    method = settings.get("quant_method")
    method = str(getattr(method, "value", method))
    if method != "bitnet":
        raise ModelError(
            f"{source} is a quantised checkpoint ({method[:40]}): only ternary ones (bitnet) are read. Start from the "
            "full-precision one."
        )
    linear, mode = settings.get("linear_class", "bitlinear"), settings.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise ModelError(f"{source} has linears of class {linear!r}, {mode!r}: transformers' bitnet has no such thing.")
    if mode == "online" and linear == "bitlinear":
        raise ModelError(f"{source} says bitlinear and online: that class has only packed weights. Its config is mistaken.")
    if mode == "offline":
        config.quantization_config = settings | {"linear_class": "bitlinear"}  # pyright: ignore[reportAttributeAccessIssue]
    return "online" if mode == "online" else linear


def adopt(model: PreTrainedModel, form: Form, source: str) -> Plan:
    """Replace, in place, transformers' quantised linears by ours, and say what they are. Nothing of its quantiser is left."""
    # Not at the top: it brings torch's compiler with it, which takes seconds.
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear

    head = model.get_output_embeddings()
    eps = [
        _adopt_linear(model, name, module, form, source)
        for name, module in list(model.named_modules())
        if isinstance(module, BitLinear | AutoBitLinear)
    ]
    tied = isinstance(head, BitLinear | AutoBitLinear) and model.config.get_text_config().tie_word_embeddings
    _require_ternary(source, eps, tied)
    _forget_quantizer(model)
    return plan_of(model, _spec(eps[0]), source)


def _require_ternary(source: str, linears: list[Any], tied_head: bool) -> None:
    if not linears:
        raise ModelError(f"{source} says that it is ternary, but none of its linears is.")
    if tied_head:
        raise ModelError(
            f"{source} has a ternary head that shares its weights with a full-precision embedding, which is not read: to have "
            "it in full precision, too, add lm_head to modules_to_not_convert in its config.json."
        )


def _spec(eps: float | None) -> TernarySpec:
    return TernarySpec(placement="none") if eps is None else TernarySpec(placement="every", eps=eps)


def _adopt_linear(model: PreTrainedModel, name: str, module: nn.Module, form: Form, source: str) -> float | None:
    """Replace one; its norm's epsilon, None if there is no norm."""
    norm = getattr(module, "rms_norm", None)
    if norm is not None:
        ours = InputRMSNorm(module.in_features, eps=norm.variance_epsilon)  # pyright: ignore[reportArgumentType]
        ours.weight = nn.Parameter(norm.weight.detach().float())
    else:
        ours = None
    if form == "online":
        eps = NORM_EPS if ours is None else ours.eps
        linear: nn.Module = TernaryLinear.from_linear(cast(nn.Linear, module), norm=None, eps=eps)
        linear.rms_norm = ours
    else:
        linear = _unpacked(module, ours, form, f"{name} of {source}")
    model.set_submodule(name, linear.eval())
    return None if ours is None else ours.eps


def _unpacked(module: nn.Module, norm: InputRMSNorm | None, form: Form, where: str) -> PackedLinear:
    packed, stored, bias = (cast(Any, getattr(module, name)) for name in ("weight", "weight_scale", "bias"))
    return unpack(packed, stored, bias, norm, form, where)


def unpack(
    packed: Tensor, stored: Tensor, bias: Tensor | None, norm: InputRMSNorm | None, form: Form, where: str
) -> PackedLinear:  # fmt: skip
    """The frozen linear of stored codes [O/4, K], weight_scale [1], bias [O]. Raises ModelError where they cannot be such."""
    if packed.dtype != torch.uint8:
        raise ModelError(f"{where} is said to be packed, and holds {packed.dtype}: its config is mistaken, or it is damaged.")
    codes = Bitnet.unpack(packed)
    if codes.max() > 1:  # two bits have four symbols
        raise ModelError(f"{where} holds a code that is none of −1, 0, 1: it is damaged, or packed in another way.")
    scale = stored.detach().float().reshape(-1)
    scale = scale.reciprocal() if form == "bitlinear" else scale
    if scale.numel() != 1 or not torch.isfinite(scale).all() or scale.item() <= 0:
        raise ModelError(f"{where} has a weight_scale that is no positive number: it is damaged.")
    if bias is not None:
        bias = bias.detach().float() * (scale if form == "autobitlinear" else 1.0)
    return PackedLinear(codes, scale.reshape(1, 1), bias, norm, "tensor", int8_activations=True)


def _forget_quantizer(model: PreTrainedModel) -> None:
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_is_quantized")),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


def plan_of(model: PreTrainedModel, spec: TernarySpec, source: str) -> Plan:
    """The plan that describes a model which has its ternary modules already. Raises ModelError for ternary modules in
    places where `tune` makes none."""
    normed = {n: getattr(m, "rms_norm", None) is not None for n, m in model.named_modules() if isinstance(m, MODULES)}
    return plan_for(model, spec, find_sites(model, (nn.Linear, *TERNARY)), normed, source)


def plan_for(model: PreTrainedModel, spec: TernarySpec, sites: tuple[Site, ...], normed: dict[str, bool], source: str) -> Plan:
    """The same where only the structure is there. normed: the ternary modules by path, and whether each has a norm in front."""
    paths: dict[Any, str] = {module: name for name, module in model.named_modules()}
    head, embedding = (paths[module] for module in (model.get_output_embeddings(), model.get_input_embeddings()))
    linears = {site.path: PlannedLinear(normed[site.path], site.role, site.norm) for site in sites if site.path in normed}
    ternary_head, ternary_embedding = head in normed, embedding in normed
    if normed.get(head):  # a plan's head has no norm; any other linear may
        linears[head] = PlannedLinear(True, "input", None)
        ternary_head = False
    if missed := [path for path in normed if path not in linears and path not in (head, embedding)]:
        raise ModelError(
            f"{source} has a ternary linear outside its decoder layers, {missed[0]}: none is known to belong there."
        )
    if ternary_head:
        spec = replace(spec, cover="+embeddings" if ternary_embedding else "+lm_head")
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    return Plan(spec, linears, embedding if ternary_embedding else None, head if ternary_head else None, tied)


def sites_of(model: PreTrainedModel) -> tuple[Site, ...]:
    """find_sites of a model without storage: a single layer of its kind, with random weights, is watched for all of them.
    Raises ModelError if its layers are not alike."""
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:1])
    text.num_hidden_layers, text.vocab_size = 1, PROBE_VOCABULARY
    if hasattr(text, "intermediate_size"):
        text.intermediate_size = PROBE_HIDDEN
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    with torch.random.fork_rng(), quiet_transformers():
        one: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ((first, _),) = decoder_layers(one)
    found = []
    for site in find_sites(one):
        for index, (path, _) in enumerate(decoder_layers(model)):
            norm = None if site.norm is None else site.norm.replace(first, path, 1)
            found.append(replace(site, path=site.path.replace(first, path, 1), layer=index, norm=norm))
    linears = {f"{path}.{n}" for path, layer in decoder_layers(model) for n, m in layer.named_modules() if type(m) is nn.Linear}
    if linears != {site.path for site in found}:
        raise ModelError(f"the layers of {type(model).__name__} differ in the linears they have: that is not known here.")
    return tuple(found)


def skeleton(config: Any, form: Form, source: str) -> tuple[PreTrainedModel, Plan]:
    """What adopt() makes, without storage: an ordinary model, and which of its linears transformers takes to be ternary."""
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = config.quantization_config
    delattr(config, "quantization_config")
    with torch.device("meta"), quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        quantised: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        AutoHfQuantizer.from_config(settings, pre_quantized=True).preprocess_model(quantised)
    model.tie_weights()
    found: dict[str, Any] = {n: m for n, m in quantised.named_modules() if isinstance(m, BitLinear | AutoBitLinear)}
    head = quantised.get_output_embeddings()
    _require_ternary(source, list(found.values()), head in found.values() and config.get_text_config().tie_word_embeddings)
    eps = [None if m.rms_norm is None else m.rms_norm.variance_epsilon for m in found.values()]
    normed = {name: norm is not None for name, norm in zip(found, eps, strict=True)}
    return model, plan_for(model, _spec(eps[0]), sites_of(model), normed, source)


def thaw(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Replace, in place, each frozen ternary module by a trainable one of the same function at λ = 1.

    Raises ModelError where training has no such function (PackedLinear.to_ternary).
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear | PackedEmbedding):
            model.set_submodule(name, module.to_ternary().eval())
    if plan.tied and plan.head is not None and plan.embedding is not None:
        shared: Any = model.get_submodule(plan.embedding)
        cast(Any, model.get_submodule(plan.head)).weight = shared.weight
    return model.requires_grad_(True)
