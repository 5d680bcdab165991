"""fold: a model trained with outlier-safe parts becomes the stock model that computes the same (arXiv 2506.19697).

    embedding   E ← E Pᵀ                a scale that the family multiplies rows by commutes with P
    head        W ← W P
    RMSNorm     w ← s · 1 − o           o is 1 where the family applies 1 + w (Gemma), which the fresh stock norm shows

in float64, rounded once to fp32. The stock model is built anew from the config, so nothing of ours is left in it, and
`save_pretrained` writes what any transformers loads. The parameters are filled by name, each exactly once.
"""

import copy
from collections.abc import Callable, Set
from functools import partial

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from trilobit.errors import ModelError
from trilobit.nn.outlier_safe import ProjectedEmbedding, ProjectedLinear, SingleScaleRMSNorm, folded_embedding, folded_linear
from trilobit.surgery.outlier_safe import TERNARY, embedding_scale, probe_norm


@torch.no_grad()
def fold(model: PreTrainedModel) -> PreTrainedModel:
    """The stock fp32 model of the same function, on the same device and in the same mode; `model` is left as it is.

    A model without outlier-safe parts comes back as an equal copy. Raises ModelError for ternary models and for models
    whose other parameters are not those of the class their config builds.
    """
    kind = type(model).__name__
    ternary = next((name for name, module in model.named_modules() if isinstance(module, TERNARY)), None)
    if ternary is not None:
        raise ModelError(f"{kind} has ternary modules ({ternary}): fold before ternarize, export after it.")
    with torch.random.fork_rng(devices=[]):
        stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    if type(stock) is not type(model):
        raise ModelError(f"the config of this {kind} builds a {type(stock).__name__}: fold the {type(stock).__name__} in it.")
    stock.to(model.device)  # pyright: ignore[reportArgumentType]
    _fill(dict(stock.named_parameters()), plain_parameters(model, stock), kind)
    buffers = _persistent_buffers(model)
    _fill(_persistent_buffers(stock), {name: partial(torch.clone, value) for name, value in buffers.items()}, kind)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.train(model.training)


def stock_structure(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model that `fold` would make of `model`, its parameters on meta."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


def plain_parameters(
    model: PreTrainedModel, stock: PreTrainedModel, read: Callable[[str], Tensor] | None = None
) -> dict[str, Callable[[], Tensor]]:
    """How to get every parameter of the plain model, by name, a shared one once: folded ones in float64, the others as they
    are. read: a parameter of `model` by its name, where it is on meta."""
    get = read or (lambda name: model.get_parameter(name).detach())
    values: dict[str, Callable[[], Tensor]] = {}
    done: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done:
                done.add(id(parameter))
                full = f"{path}.{name}" if path else name
                values[full] = partial(get, full)
        if isinstance(module, ProjectedEmbedding):
            # One unless the model was cast: a bf16 Gemma multiplies by √D in bf16.
            ratio = module.scale / embedding_scale(stock.get_submodule(path))
            values[f"{path}.weight"] = partial(_embedding, get, path, ratio)
            done.add(id(module.projection.weight))
        elif isinstance(module, ProjectedLinear):
            values[f"{path}.weight"] = partial(_head, get, path)
            done.add(id(module.projection.weight))
        elif isinstance(module, SingleScaleRMSNorm):
            norm = stock.get_submodule(path)
            rule = probe_norm(norm)
            assert rule is not None and rule.eps == module.eps, (path, rule, module.eps)
            del values[f"{path}.weight"]
            values[f"{path}.{rule.parameter}"] = partial(
                _gain, get, path, rule.offset, norm.get_parameter(rule.parameter).shape
            )
    return values


def _embedding(get: Callable[[str], Tensor], path: str, ratio: float) -> Tensor:
    return folded_embedding(get(f"{path}.weight"), get(f"{path}.projection.weight")) * ratio


def _head(get: Callable[[str], Tensor], path: str) -> Tensor:
    return folded_linear(get(f"{path}.weight"), get(f"{path}.projection.weight"))


def _gain(get: Callable[[str], Tensor], path: str, offset: float, shape: torch.Size) -> Tensor:
    return (get(f"{path}.weight").double() - offset).expand(shape)


def _persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _fill(targets: dict[str, Tensor], values: dict[str, Callable[[], Tensor]], kind: str) -> None:
    """Copy `values` into `targets`, names and shapes agreeing to the last."""
    require_same_names(targets.keys(), values.keys(), kind)
    for name, target in targets.items():
        value = values[name]()
        assert target.shape == value.shape, (name, target.shape, value.shape)
        target.copy_(value)


def require_same_names(stock: Set[str], plain: Set[str], kind: str) -> None:
    """Raise ModelError if a model of this kind, made plain, has other parameters than the stock model."""
    for name in sorted(stock ^ plain):
        where = "only the stock model has" if name in stock else "the stock model has no"
        raise ModelError(f"{kind} is not the stock model with outlier-safe parts: {where} {name}.")
