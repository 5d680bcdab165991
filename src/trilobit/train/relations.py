"""Distilling how tokens relate inside one attention layer: MiniLM's loss, as BitDistill uses it on ternary students.

    R(a) = softmax(a aᵀ / √d)   of the queries, the keys and the values of a layer, head by head
    L    = Σ over q, k, v of the mean over heads and positions of KL(R_teacher ‖ R_student)

MiniLMv2, arXiv 2012.15828, eq. 4; BitDistill, arXiv 2510.13998. What they leave open is ours: heads are the model's own
(keys and values have fewer under grouped queries), states are taken as attention gets them (after RoPE), no mask.

The states are caught by an attention function that transformers is told of, so that no module is known by its name.

Letters: B batch, H heads, T positions, d width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trilobit.errors import ConfigError

NAME = "trilobit_recorded"
States = tuple[Tensor, Tensor, Tensor]


def relation_divergence(student: States, teacher: States) -> Tensor:
    """Σ over queries, keys, values of the mean over B, H, T of KL(R_teacher ‖ R_student). States: [B, H, T, d] each."""
    parts = [
        F.kl_div(_log_relations(s), _log_relations(t.detach()), reduction="none", log_target=True).sum(dim=-1).mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).sum()


def _log_relations(states: Tensor) -> Tensor:
    """log softmax(a aᵀ / √d), [B, H, T, T], in fp32 at least."""
    with torch.autocast(states.device.type, enabled=False):
        a = states if states.dtype == torch.float64 else states.float()
        return F.log_softmax(a @ a.transpose(-1, -2) / a.shape[-1] ** 0.5, dim=-1)


class Recorder:
    """Keeps the queries, keys and values of one attention layer of `model` at every forward, until `close`."""

    def __init__(self, model: PreTrainedModel, layer: int):
        if model.config._attn_implementation != "sdpa":
            raise ConfigError(
                "--distill-attention needs a model whose attention transformers runs as sdpa, and this one is "
                f"{model.config._attn_implementation}."
            )
        self._model, self._states = model, None
        model.set_attn_implementation(NAME)
        modules = _attention_modules(model)
        if not 0 <= layer < len(modules):
            self.close()
            raise ConfigError(f"--distill-attention-layer {layer}: the model has {len(modules)} layers, 0 is the first.")
        modules[layer]._trilobit_keep = self._keep  # pyright: ignore[reportArgumentType]
        self._module = modules[layer]

    def take(self) -> States:
        """The states of the last forward; they are forgotten with it."""
        states, self._states = self._states, None
        assert states is not None, "no forward has been run"
        return states

    def close(self) -> None:
        """Put the attention back as it was."""
        self._model.set_attn_implementation("sdpa")
        if (module := getattr(self, "_module", None)) is not None:
            del module._trilobit_keep

    def _keep(self, states: States) -> None:
        self._states = states


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call the attention function, in the order in which they call it."""
    calls: list[nn.Module] = []
    for module in model.modules():
        object.__setattr__(module, "_trilobit_keep", lambda states, module=module: calls.append(module))
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for module in model.modules():
            object.__delattr__(module, "_trilobit_keep")
    return calls


def _recorded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
    keep: Callable[[States], None] | None = getattr(module, "_trilobit_keep", None)
    if keep is not None:
        torch.compiler.disable(keep)((query, key, value))  # pyright: ignore[reportArgumentType]
    return sdpa_attention_forward(module, query, key, value, *arguments, **options)


AttentionInterface.register(NAME, _recorded)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
