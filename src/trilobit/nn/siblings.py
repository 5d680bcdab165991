"""Frozen linears that read the same input (q, k and v; gate and up), met together where a few tokens are computed on a GPU.

One token is a matter of launches: six of them become two. The first of the siblings computes all outputs, the others, called
with the very same tensor, take theirs. Whoever is called with another tensor computes alone.

Letters: T tokens, S siblings, K inputs, O outputs of all, G groups of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilobit import quant
from trilobit.formats import LaneTwoBit
from trilobit.kernels import gpu
from trilobit.nn.packed import PackedLinear

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_siblings(model: nn.Module) -> None:
    """Make siblings of the linears in `model` that are alike but for their norms' gains."""
    for module in model.modules():
        for names in TOGETHER:
            found = [part for name in names if isinstance(part := module._modules.get(name), PackedLinear)]
            if len(found) == len(names) and _alike(found):
                siblings = Siblings(found)
                for linear in found:
                    linear.siblings = siblings


def _alike(linears: list[PackedLinear]) -> bool:
    kinds = {(linear.in_features, linear.granularity, linear.int8_activations) for linear in linears}
    norms = {None if linear.rms_norm is None else linear.rms_norm.eps for linear in linears}
    return len(kinds) == len(norms) == 1 and linears[0].int8_activations


@dataclass(frozen=True)
class Answer:
    """All outputs for one input, as it was."""

    input: Tensor
    version: int
    outputs: list[Tensor]


class Siblings:
    """Two or three linears. Their codes are packed one below the other, and each linear's own are a part of that.

    Scales, biases and gains are copied together: what is changed in place counts from the next input on, what is changed
    behind autograd's back (through `.data`) does not.
    """

    def __init__(self, linears: list[PackedLinear]):
        self.linears = linears
        self.sizes = tuple(linear.out_features for linear in linears)
        self._operands: tuple[Tensor | None, Tensor, Tensor, Tensor | None] | None = None  # gains, codes, scales, bias
        self._made_from: list[tuple[Tensor, int, int]] = []
        self._answer: Answer | None = None  # one attribute: another thread replaces it whole

    def output_of(self, linear: PackedLinear, input: Tensor) -> Tensor | None:
        """As nn.packed.Together says."""
        if torch.compiler.is_compiling():
            return None
        answer = self._answer
        if linear is self.linears[0]:
            outputs = self._compute(input)
            answer = self._answer = Answer(input, _version(input), outputs) if outputs else None
        if answer is None or answer.input is not input or answer.version != _version(input):
            return None
        if linear is self.linears[-1]:
            self._answer = None
        return answer.outputs[[sibling is linear for sibling in self.linears].index(True)]

    def _compute(self, input: Tensor) -> list[Tensor]:
        """All outputs, or none."""
        rows, (first, *_) = input.reshape(-1, input.shape[-1]), self.linears
        if type(input) is not Tensor or not gpu.runs_on(rows):
            self._operands, self._made_from = None, []
            return []
        group, norm = quant.group_size(first.granularity) or 0, first.rms_norm
        if not gpu.merges(self.sizes, norm is not None, len(rows), first.in_features, group):
            return []
        if any(tensor.device != rows.device for tensor in self._tensors()):  # kept elsewhere until they are needed
            return []
        gains, packed, scale, bias = self._current()
        y = gpu.merged_linear(rows, gains, 0.0 if norm is None else norm.eps, packed, scale, bias, group, self.sizes)
        return list(y.view(*input.shape[:-1], -1).split(self.sizes, dim=-1))

    def _current(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """What the kernels read, made again if a tensor has changed or moved."""
        now = [(t, t.data_ptr(), _version(t)) for t in self._tensors()]
        same = len(now) == len(self._made_from) and all(
            a is b and rest == before for (a, *rest), (b, *before) in zip(now, self._made_from, strict=True)
        )
        if self._operands is None or not same:
            self._operands, self._made_from = self._make(), now
        return self._operands

    def _tensors(self) -> Iterator[Tensor]:
        for linear in self.linears:
            yield from (linear.codes, linear.scale)
            yield from () if linear.bias is None else (linear.bias,)
            yield from () if linear.rms_norm is None else (linear.rms_norm.weight,)

    def _make(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        linears = self.linears
        packed = torch.cat([LaneTwoBit.pack(linear.codes) for linear in linears])
        scale = torch.cat([linear.scale.expand(linear.out_features, -1) for linear in linears])
        bias = gains = None
        if any(linear.bias is not None for linear in linears):
            own = [scale.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears]
            bias = torch.cat(own)
        found = [linear.rms_norm.weight.detach() for linear in linears if linear.rms_norm is not None]
        if found:
            width = max(gain.numel() for gain in found)
            gains = torch.stack([gain.reshape(-1).expand(width) for gain in found])
        for linear, part in zip(linears, packed.split(self.sizes), strict=True):
            linear.keep_packed(part)
        return gains, packed, scale, bias


def _version(tensor: Tensor) -> int:
    """Counts changes in place; inference tensors do not count theirs."""
    return -1 if tensor.is_inference() else tensor._version
