"""Hadamard transforms that run with the model, where no weight in front of a tensor could take them (QuaRot, arXiv 2404.00456).

    what the MLP's last linear reads      x → x R, W → W R                 behind a product of two activations
    what the attention's last reads       the same across heads: H ⊗ I     behind mixtures that differ by head
    queries and keys, after RoPE          q → q R, k → k R                 in attention.py: behind one that differs by position

R = Hᵀ/√n (hadamard.py). The logits stay what they are: (x R)(W R)ᵀ = x Wᵀ and (q R)(k R)ᵀ = q kᵀ. Weights are turned once,
in float64; inputs are turned by forward pre-hooks, queries and keys by an attention function. Order matters: pre-hooks and
changes run in the order in which they were attached, so attach these first and whatever quantises after them.
Everything survives copy.deepcopy; nothing is written by save_pretrained.

Letters: B batch, H heads, T positions, W head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trilobit.errors import ModelError
from trilobit.fourbit.hadamard import constructible, construction, transform
from trilobit.fourbit.quarot import head_width
from trilobit.surgery.roles import PROBE_TOKENS, Role, decoder_layers, evaluating, find_sites
from trilobit.surgery.rotate import change_rows

Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(Q [B, H, T, W], K [B, N, T', W], V [B, N, T', W]) after RoPE and cache → the same, changed."""

ATTENTION = "trilobit_changed_sdpa"
NO_FFN = "Use --rotate none, which transforms no MLP."


@dataclass(frozen=True)
class OnlineReport:
    """Where a transform runs. sites: paths of linears, or of decoder layers; empty where `why` says what stands against it."""

    what: str
    width: int
    sites: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if not self.sites else f"{self.what}: {self.why}, at {len(self.sites)} places"


def attach_ffn_hadamard(model: PreTrainedModel) -> OnlineReport:
    """Transform what the last linear of every MLP reads. Raises UnsupportedError, with nothing changed, if it cannot."""
    linears = _ends(model, "mlp-output")
    widths = sorted({linear.in_features for linear in linears.values()})
    made = ", ".join(construction(width, NO_FFN) for width in widths)
    for linear in linears.values():
        _transform_input(linear, transform)
    return OnlineReport("MLP output", widths[-1], tuple(linears), made)


def has_online_transform(linear: nn.Module) -> bool:
    """Whether a transform of what `linear` reads is attached."""
    return any(isinstance(hook, partial) and hook.func is _turned for hook in linear._forward_pre_hooks.values())


def attach_head_hadamard(model: PreTrainedModel) -> OnlineReport:
    """Transform what the last linear of every attention reads across its heads: each channel of a head with its namesakes.

    With values turned head by head (quarot), the two make one Hadamard transform of the whole width. Where the number of
    heads has no Hadamard matrix (SmolLM2-135M's nine), nothing is attached and the report says so.
    """
    linears, width = _ends(model, "attention-output"), head_width(model)
    counts = sorted({linear.in_features // width for linear in linears.values()})
    what = "attention output, across heads"
    missing = next((count for count in counts if not constructible(count)), None)
    if missing is not None:
        return OnlineReport(what, missing, (), f"none, since there is no Hadamard matrix of {missing} heads")
    made = ", ".join(construction(count) for count in counts)
    for linear in linears.values():
        _transform_input(linear, partial(_across_heads, width))
    return OnlineReport(what, counts[-1], tuple(linears), made)


def attach_attention(model: PreTrainedModel, change: Change) -> Callable[[], None]:
    """Let `change` replace queries, keys and values of every layer after RoPE, in front of the attention's products; what is
    returned, called, takes it out again.

    Changes run in the order of their attachment. What the cache keeps is unchanged; all of it passes `change` at every step.
    Raises ModelError, with nothing changed, unless the model's attention is sdpa and every decoder layer runs through it.
    """
    name = model.config._attn_implementation
    if name not in ("sdpa", ATTENTION):
        raise ModelError(
            f"{type(model).__name__} runs its attention as {name}, where keys and values cannot be reached after RoPE: "
            "leave the cache at 16 bits (--bits 4-4-16); in Python, load a model whose architecture has it with "
            'attn_implementation="sdpa".'
        )
    layers = decoder_layers(model)
    if name == "sdpa":
        changes: list[Change] = []
        for _, layer in layers:
            for module in layer.modules():
                module._trilobit_changes = changes  # pyright: ignore[reportArgumentType]
        model.set_attn_implementation(ATTENTION)
        _require_all_layers(model, changes, layers)
    attached: Any = layers[0][1]._trilobit_changes
    attached.append(change)

    def detach() -> None:
        attached.remove(change)
        if not attached:
            _put_back(model, layers)

    return detach


def _put_back(model: PreTrainedModel, layers: list[tuple[str, nn.Module]]) -> None:
    model.set_attn_implementation("sdpa")
    for _, layer in layers:
        for module in layer.modules():
            del module._trilobit_changes


def _require_all_layers(model: PreTrainedModel, changes: list[Change], layers: list[tuple[str, nn.Module]]) -> None:
    """Raise ModelError, sdpa put back, unless a forward passes `changes` as often as there are layers."""
    calls = 0

    def count(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return query, key, value

    changes.append(count)
    try:
        probe(model)
    finally:
        changes.pop()
    if calls != len(layers):
        _put_back(model, layers)
        raise ModelError(
            f"{calls} of the {len(layers)} layers of {type(model).__name__} run an attention whose queries and keys can be "
            "changed after RoPE; all have to, or the cache stays at 16 bits (--bits 4-4-16)."
        )


def probe(model: PreTrainedModel) -> None:
    """A forward over a few tokens, for what watches it."""
    with evaluating(model):
        model(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device), use_cache=False)


def _ends(model: PreTrainedModel, role: Role) -> dict[str, nn.Linear]:
    """Path and module of the linears of a role."""
    linears = {}
    for site in find_sites(model):
        linear = model.get_submodule(site.path)
        assert isinstance(linear, nn.Linear), type(linear)
        if site.role == role:
            linears[site.path] = linear
    if not linears:
        raise ModelError(f"{type(model).__name__} has no linear at the end of its {role.removesuffix('-output')} blocks.")
    return linears


@torch.no_grad()
def _transform_input(linear: nn.Linear, turn: Callable[[Tensor], Tensor]) -> None:
    change_rows(linear.weight, turn)
    linear.register_forward_pre_hook(partial(_turned, turn))


def _turned(turn: Callable[[Tensor], Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (turn(inputs[0]), *inputs[1:])


def _across_heads(width: int, x: Tensor) -> Tensor:
    """[..., H W] → the same, channel w of all heads transformed together."""
    return transform(x.unflatten(-1, (-1, width)).mT).mT.reshape(x.shape)


def _changed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
    changes: Any = module._trilobit_changes
    for change in changes:
        query, key, value = change(query, key, value)
    return sdpa_attention_forward(module, query, key, value, *arguments, **options)


AttentionInterface.register(ATTENTION, _changed_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
