"""What each linear of a decoder is for, found by watching it work rather than by reading names.

Four forwards over a few random tokens decide everything:

  plain     which linears run, in which order, which share an input tensor, whose input is a norm's output
  causal    the last token changes: if an earlier position notices, the model is an encoder
  silenced  every decoder linear returns zeros: one that still receives a signal reads the residual stream ("in");
            one that receives exact zeros reads other linears ("out")
  pinned    every decoder linear returns fixed noise, then the same with other noise at position 0: an "out" linear whose
            input at a later position notices reads a token mixer (attention output); the others are MLP outputs

Module types decide what is eligible: a decoder module other than nn.Linear, norm or embedding that owns a parameter of
two or more dimensions (experts, Conv1D) is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trilobit.errors import ModelError, RolesError
from trilobit.nn.ternary import TernaryModule

Role = Literal["input", "attention-output", "mlp-output"]

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Site:
    """One linear of a decoder layer.

    path: as in named_modules(). layer: index of its decoder layer. role: where its input comes from. norm: path of the
    norm whose output it reads directly, or None. group: linears with equal numbers read the same tensor.
    """

    path: str
    layer: int
    role: Role
    norm: str | None
    group: int


@dataclass(frozen=True)
class Roles:
    """The table that surgery, export and optimizer routing read."""

    sites: tuple[Site, ...]
    layers: tuple[str, ...]
    embedding: str
    head: str
    tied: bool


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of each decoder layer, in order. Raises ModelError if there is none."""
    layers: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    kinds = {type(module) for _, module in layers}
    if not layers:
        raise ModelError(f"{type(model).__name__} has no transformers decoder layers.")
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ModelError(f"{type(model).__name__} mixes kinds of layers ({names}); a decoder-only text model is needed.")
    return layers


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the embedding: token ids are below it."""
    return model.get_input_embeddings().num_embeddings  # pyright: ignore[reportReturnType] (packed ones have no weight)


def find_roles(model: PreTrainedModel) -> Roles:
    """Probe `model` and return the role of every decoder linear. The model is left as it was.

    Raises ModelError for encoders, quantised checkpoints, models that are ternary already, and decoder modules that own
    matrices but are not exactly nn.Linear.
    """
    kind = type(model).__name__
    if any(isinstance(module, TernaryModule) for module in model.modules()):
        raise ModelError(f"{kind} is ternary already. Start from the full-precision checkpoint.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{kind} is a quantised checkpoint. Start from the full-precision one.")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(model.config, "is_encoder_decoder", False) or not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{kind} is not a decoder-only text model.")
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{kind} has no linear language-model head.")
    paths: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return Roles(
        sites=find_sites(model),
        layers=tuple(path for path, _ in decoder_layers(model)),
        embedding=paths[embedding],
        head=paths[head],
        tied=head.weight is embedding.weight,
    )


def find_sites(model: PreTrainedModel, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> tuple[Site, ...]:
    """Probe `model` for its decoder linears (modules of exactly these kinds) alone, in running order; it is left as it was.

    Raises ModelError for models without decoder layers, encoders, and decoder modules of other kinds that own matrices.
    """
    linears: dict[nn.Module, tuple[str, int]] = {}
    for index, (layer_path, layer) in enumerate(decoder_layers(model)):
        for name, module in layer.named_modules(prefix=layer_path):
            if type(module) in kinds:
                linears[module] = (name, index)
            else:
                _refuse_foreign_matrix(name, module)
    paths: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return tuple(_probe(model, linears, paths))


def _refuse_foreign_matrix(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        return
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            raise RolesError(
                f"{name} is a {type(module).__name__} that owns {parameter_name} {tuple(parameter.shape)}: what it is for is "
                "not known, only nn.Linear is understood (not experts, Conv1D, …)."
            )


def _probe(model: PreTrainedModel, linears: dict[nn.Module, tuple[str, int]], paths: dict[nn.Module, str]) -> list[Site]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_size(model)
    tokens = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    noise = {m: torch.randn(1, PROBE_TOKENS, m.out_features, generator=generator) for m in linears}  # pyright: ignore

    def silence(module: nn.Module, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def pin(change: float) -> Callable[[nn.Module, Tensor], Tensor]:
        def pinned(module: nn.Module, output: Tensor) -> Tensor:
            fixed = noise[module].clone()
            fixed[:, 0] += change
            if fixed.numel() != output.numel():
                raise RolesError(f"{linears[module][0]} runs on some tokens only (experts?), so its role is unknown.")
            return fixed.to(output).reshape(output.shape)  # OPT flattens batch and time

        return pinned

    with evaluating(model):
        plain, logits = _watch(model, tokens.to(device), linears, paths)
        _, causal = _watch(model, other.to(device), linears, paths)
        silenced, _ = _watch(model, tokens.to(device), linears, paths, silence)
        pinned, _ = _watch(model, tokens.to(device), linears, paths, pin(0.0))
        moved, _ = _watch(model, tokens.to(device), linears, paths, pin(1.0))
    if not torch.isfinite(logits).all():
        broken = [linears[module][0] for module, seen in plain.items() if not torch.isfinite(seen.value).all()]
        where = f"what {broken[0]} reads" if broken else "what follows the last of its linears"
        raise ModelError(f"{type(model).__name__} gives logits that are not finite, first in {where}: its weights are damaged.")
    if not torch.equal(logits[:, :-1], causal[:, :-1]):
        raise ModelError(f"{type(model).__name__} is not causal (an encoder?): earlier positions see later tokens.")
    missed = [name for module, (name, _) in linears.items() if module not in plain]
    if missed:
        raise RolesError(f"{missed[0]} did not run in a forward pass; its role is unknown.")

    groups: dict[int, int] = {}
    sites = []
    for module, seen in plain.items():
        path, layer = linears[module]
        role: Role = "input"
        if not silenced[module].value.any():
            before, after = (run[module].value.reshape(PROBE_TOKENS, -1)[1:] for run in (pinned, moved))
            mixed = not torch.equal(before, after)
            role = "attention-output" if mixed else "mlp-output"
        group = groups.setdefault(seen.identity, len(groups))
        sites.append(Site(path, layer, role, seen.norm, group))
    return sites


@dataclass(frozen=True)
class _Seen:
    value: Tensor
    identity: int
    norm: str | None


def _watch(
    model: PreTrainedModel, tokens: Tensor, linears: dict[nn.Module, Any], paths: dict[nn.Module, str],
    replace: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> tuple[dict[nn.Module, _Seen], Tensor]:  # fmt: skip
    """One forward; what each linear received. Tensors are kept alive so that their identities stay distinct."""
    seen: dict[nn.Module, _Seen] = {}
    norm_outputs: dict[int, tuple[str, Tensor]] = {}
    handles = []

    def after_norm(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            norm_outputs[id(output)] = (paths[module], output)

    def after_linear(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0]
        name, kept = norm_outputs.get(id(x), (None, None))
        seen[module] = _Seen(x, id(x), name if kept is x else None)
        return None if replace is None else replace(module, output)

    for module in model.modules():
        if module in linears:
            handles.append(module.register_forward_hook(after_linear))
        elif is_norm(module):
            handles.append(module.register_forward_hook(after_norm))
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a leaf that owns vectors only, as norms of every kind do."""
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not list(module.children()) and all(p.ndim <= 1 for p in parameters)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, then give every module its own training mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
