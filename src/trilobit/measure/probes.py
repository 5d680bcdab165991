"""Where to look into a decoder: the tensors that its linears and its layers pass on, found by role and watched by hooks.

    attention-input    what q/k/v read            attention-output   what the attention's last linear reads (o_proj)
    mlp-input          what gate/up read          mlp-output         what the MLP's last linear reads (down_proj)
    residual           the output of each layer   final-norm         the output of the base model, which the head reads

Roles come from surgery/roles.py, never from names; an "input" linear belongs to the output that runs next. Where several
linears read one site, the first that runs stands for all. In a ternary model a site is what reaches the linear, before a
norm of the linear's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.errors import ModelError, RolesError
from trilobit.nn.packed import PackedLinear
from trilobit.nn.ternary import TernaryLinear
from trilobit.surgery.outlier_safe import require_causal
from trilobit.surgery.roles import PROBE_TOKENS, decoder_layers, evaluating, find_sites, vocabulary_size

SiteName = Literal["residual", "attention-input", "attention-output", "mlp-input", "mlp-output", "final-norm"]
SITES: tuple[SiteName, ...] = get_args(SiteName)
KINDS = (nn.Linear, TernaryLinear, PackedLinear)


@dataclass(frozen=True)
class Probe:
    """A tensor to watch: the input or the output of a module (path as in named_modules(); "": the base model)."""

    layer: int | None
    site: SiteName
    module: str
    of: Literal["input", "output"]


def find_probes(model: PreTrainedModel) -> tuple[list[Probe], str]:
    """What to watch, in no particular order, and why the sites inside the layers are not among it, where their linears cannot
    be told apart (experts, Conv1D, state spaces): there it is what layers pass on alone.

    Raises ModelError for what has no decoder layers, is not causal, is damaged, or passes on more than a vector a token.
    """
    between = [Probe(layer, "residual", path, "output") for layer, (path, _) in enumerate(decoder_layers(model))]
    between.append(Probe(None, "final-norm", "", "output"))
    try:
        return [*_inside(model), *between], ""
    except RolesError as error:
        require_causal(model)
        return _understood(model, between), str(error)


def _understood(model: PreTrainedModel, probes: list[Probe]) -> list[Probe]:
    """`probes`, but for a final norm that is none, as the base model is the whole one and ends in logits. Raises ModelError
    if what layers pass on has not one vector a token (Gemma 3n has four)."""
    tokens = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None] % vocabulary_size(model)
    seen: dict[Probe, torch.Size] = {}
    with evaluating(model), watched(model, probes, lambda probe, x: seen.update({probe: x.shape})):
        model.base_model(input_ids=tokens, use_cache=False)
    width = seen[probes[0]][-1]
    for probe, shape in seen.items():
        if probe.site == "residual" and (shape[-1], shape.numel()) != (width, PROBE_TOKENS * width):
            raise ModelError(f"{probe.module} passes on {tuple(shape)} for {PROBE_TOKENS} tokens, not one vector each.")
    return [probe for probe in probes if seen[probe][-1] == width]


def _inside(model: PreTrainedModel) -> list[Probe]:
    """What linears inside the layers read. Raises RolesError, saying what is not understood."""
    sites = find_sites(model, KINDS)
    found: dict[tuple[int, str], Probe] = {}
    waiting = []
    for site in sites:
        if site.role == "input":
            waiting.append(site)
            continue
        part = "attention" if site.role == "attention-output" else "mlp"
        if (site.layer, f"{part}-output") in found:
            raise RolesError(
                f"layer {site.layer} has more than one linear at the end of its {part} ({site.path} is one), so its parts "
                "cannot be told apart."
            )
        for end, member in [*(("input", other) for other in waiting if other.layer == site.layer), ("output", site)]:
            name: Any = f"{part}-{end}"
            found.setdefault((site.layer, name), Probe(site.layer, name, member.path, "input"))
        waiting = []
    return list(found.values())


@contextmanager
def watched(model: PreTrainedModel, probes: list[Probe], see: Callable[[Probe, Tensor], None]) -> Iterator[None]:
    """Show each probe's tensor to `see` as it comes up in a forward of the base model, while the block lasts."""

    def before(probe: Probe, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        see(probe, inputs[0])

    def after(probe: Probe, module: nn.Module, inputs: Any, output: Any) -> None:
        see(probe, output if isinstance(output, Tensor) else output[0])

    handles = []
    for probe in probes:
        module = model.get_submodule(probe.module) if probe.module else model.base_model
        if probe.of == "input":
            handles.append(module.register_forward_pre_hook(partial(before, probe)))
        else:
            handles.append(module.register_forward_hook(partial(after, probe)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activations(model: PreTrainedModel, layer: int | None, site: SiteName, window: Tensor) -> Tensor:
    """|x| at one site while `model` reads window [T]: [T, W] fp32 on the CPU."""
    seen: list[Tensor] = []
    probes = [probe for probe in find_probes(model)[0] if (probe.layer, probe.site) == (layer, site)]
    device = next(model.parameters()).device

    def see(probe: Probe, x: Tensor) -> None:
        seen.append(x.reshape(len(window), -1).abs().float().cpu())

    with torch.no_grad(), evaluating(model), watched(model, probes, see):
        model.base_model(input_ids=window[None].to(device), use_cache=False)
    (values,) = seen
    return values
