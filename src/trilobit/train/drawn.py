"""A model of random weights in parts, with exactly the numbers that one process draws, and without having been whole.

    constructors run on the CPU, a module at a time ──▶ what they drew inside the layers is dropped (matrices go to meta)
    transformers' initialisation, a module at a time ──▶ a module's matrices are real while it runs; this rank's rows are kept

The generator is asked for the same numbers in the same order as without this, so that they are the same, and depend on the
seed alone. Vectors, and what a model owns outside its layers (embedding, head), stay whole, on the CPU, until they are cut:
surgery (surgery/outlier_safe.py) finds them as they are. Every rank takes the time that one process does to draw everything.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.tensors import fingerprint
from trilobit.train.pieces import heights


class NotDrawn(ModelError):
    """Why a model's random weights cannot be drawn module by module."""


@dataclass
class Drawn:
    """model: matrices inside its layers on meta, everything else on the CPU. rows: of each of these matrices, this rank's."""

    model: PreTrainedModel
    rows: dict[str, Tensor]
    digest: str = field(repr=False)
    """Of all that was drawn: ranks that have the same have drawn the same."""


def draw(build: Callable[[], PreTrainedModel], part: int, parts: int) -> Drawn:
    """What `build` makes, of which this rank keeps part `part` of `parts`. Raises NotDrawn for a model whose initialisation
    does not fill a module's matrices when it comes to that module; the generator has moved then."""
    rows: dict[nn.Parameter, Tensor] = {}
    digest = hashlib.sha256()

    def keep(parameter: nn.Parameter, drawn: Tensor) -> None:
        digest.update(drawn.numpy().data)
        high = heights(drawn.shape[0], parts)
        start = sum(high[:part])
        rows[parameter] = drawn[start : start + high[part]].clone()

    with _dropping(), _initialising(keep):
        model = build()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter not in rows:
            raise NotDrawn(f"{name} is not filled by the initialisation of its own module")
        if parameter.is_meta:
            found[name] = rows[parameter]
    rest = fingerprint((n, p) for n, p in model.named_parameters() if not p.is_meta)
    return Drawn(model, found, f"{digest.hexdigest()} {rest}")


def _hidden(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None and p.is_meta}


@contextmanager
def _dropping() -> Iterator[None]:
    """Inside, matrices of a module go to meta as soon as it becomes part of another one, unless that is a whole model."""

    def drop(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is None or isinstance(parent, PreTrainedModel):
            return
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                module._parameters[own] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_module_registration_hook(drop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _initialising(keep: Callable[[nn.Parameter, Tensor], None]) -> Iterator[None]:
    """Inside, transformers initialises real matrices in the place of those on meta, and `keep` gets each of them."""
    original = getattr(PreTrainedModel, "_initialize_weights", None)
    if original is None:
        raise NotDrawn("this version of transformers initialises in another way")

    def initialise(self: PreTrainedModel, module: nn.Module, *arguments: Any, **options: Any) -> None:
        hidden = {} if getattr(module, "_is_hf_initialized", False) else _hidden(module)
        for name, parameter in hidden.items():
            module._parameters[name] = nn.Parameter(torch.full(parameter.shape, torch.nan, dtype=parameter.dtype))
        with _OnMeta():
            original(self, module, *arguments, **options)
        for name, parameter in hidden.items():
            drawn = module._parameters[name]
            assert drawn is not None
            if drawn.isnan().any():
                raise NotDrawn(f"a {type(module).__name__} does not fill its {name}")
            keep(parameter, drawn.detach())
            module._parameters[name] = parameter

    PreTrainedModel._initialize_weights = initialise  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original


class _OnMeta(TorchDispatchMode):
    """Inside, whoever computes with what is on meta is stopped: it would draw nothing, and fill nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            raise NotDrawn("one module fills matrices of another")
        return func(*args, **(kwargs or {}))
