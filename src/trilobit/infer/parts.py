"""Where the compiler's numbers come from, module by module: a model in memory, or something that reads files when it is asked
(export/source.py)."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.quant import Granularity


@dataclass(frozen=True)
class Kind:
    """What a ternary module is, without its numbers. eps: of the norm in front, None if there is none; gain: its length."""

    granularity: Granularity
    int8: bool = False
    bias: bool = False
    eps: float | None = None
    gain: int = 0


class Parts(Protocol):
    """Where the numbers of a model come from, module by module."""

    def kind(self, path: str) -> Kind | None:
        """Of the module at `path`; None if it is not ternary (or not yet frozen)."""
        ...

    def packed(self, path: str) -> PackedLinear | PackedEmbedding: ...

    def kept(self, name: str) -> Tensor:
        """A parameter outside the ternary modules, fp32."""
        ...

    def gain(self, path: str) -> Tensor:
        """Of the norm in front of a ternary linear, [K] or [1], fp32."""
        ...

    def shares_table(self) -> bool:
        """Whether a ternary head has the codes and scales of a ternary embedding."""
        ...


class Whole:
    """The parts of a model that is in memory, its ternary modules frozen."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def kind(self, path: str) -> Kind | None:
        module = self.model.get_submodule(path)
        return kind_of(module) if isinstance(module, PackedLinear | PackedEmbedding) else None

    def packed(self, path: str) -> PackedLinear | PackedEmbedding:
        module: Any = self.model.get_submodule(path)
        return module

    def kept(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach().float()

    def gain(self, path: str) -> Tensor:
        return self.kept(f"{path}.rms_norm.weight")

    def shares_table(self) -> bool:
        table: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()
        return torch.equal(table.codes, head.codes) and torch.equal(table.scale, head.scale)


def kind_of(module: PackedLinear | PackedEmbedding) -> Kind:
    """Of a frozen module."""
    if isinstance(module, PackedEmbedding):
        return Kind(module.granularity)
    norm = module.rms_norm
    eps, gain = (None, 0) if norm is None else (norm.eps, len(norm.weight))
    return Kind(module.granularity, module.int8_activations, module.bias is not None, eps, gain)
