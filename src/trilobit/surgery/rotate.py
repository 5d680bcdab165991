"""rotate: turn the residual stream of a decoder by an orthogonal matrix, fused into the weights (QuaRot, arXiv 2404.00456).

    embedding, and every linear that writes to the stream        E ← E R      W ← Rᵀ W,  b ← b R
    every linear that reads it through a norm with gain g        W ← W diag(g) R         and g ← 1
    optional, by head: values V, and what reads the attention    W_v ← R₂ᵀ W_v,  b_v ← b_v R₂      W_o ← W_o R₂

No logit changes: x R has the length of x, so RMSNorm without gains commutes with R, and every W meets R Rᵀ = I. The
embeddings are not centred: that is exact for LayerNorm and wrong for RMSNorm. A tied head is untied, because the final
gain is folded into the head alone. Everything is computed in float64 and rounded once to the weights' dtype.

Who reads and who writes is found by watching the model run, and proven before a weight is touched (stream.py).

A rotated model of low precision rounds outliers into all channels: rotate in fp32 where a model has massive activations.

Letters: D width of the stream, R, C rows and columns, O outputs, W head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.surgery.outlier_safe import NormRule, untie
from trilobit.surgery.stream import find_stream, find_values

Turn = Callable[[Tensor], Tensor]
"""[..., D] → [..., D], every row x to x R."""

ELEMENTS = 1 << 22  # of a weight that are in float64 at once


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of rows of `width` numbers, x → x R, and what it is."""

    width: int
    apply: Turn
    description: str

    @classmethod
    def of(cls, matrix: Tensor) -> "Rotation":
        """x → x R for a given R [D, D]. Raises ModelError unless R is orthogonal (to 1e-5 in every entry of R Rᵀ)."""
        width = len(matrix)
        exact = matrix.detach().double()
        if exact.shape != (width, width) or not torch.allclose(exact @ exact.T, torch.eye(width).to(exact), rtol=0, atol=1e-5):
            raise ModelError(f"the rotation {tuple(matrix.shape)} is not an orthogonal matrix, so it would change the model.")
        return cls(width, lambda x: x @ exact.to(x), f"a given matrix [{width}, {width}]")


@dataclass(frozen=True)
class RotationReport:
    """What `rotate` did. values: how the values were turned, or why they were not."""

    rotation: str
    width: int
    untied: bool
    norms: int
    readers: int
    writers: int
    values: str

    def __str__(self) -> str:
        head = "embedding and head, untied" if self.untied else "embedding and head"
        return (
            f"residual stream of {self.width} turned by {self.rotation}: {self.writers} linears that write to it, "
            f"{self.readers} that read it with the gains of {self.norms} norms, {head}\nvalues: {self.values}"
        )


@torch.no_grad()
def rotate(model: PreTrainedModel, rotation: Tensor | Rotation, values: Tensor | Rotation | None = None) -> RotationReport:
    """Turn the residual stream of `model`, in place, its logits unchanged; all gains of its block and final norms become one.

    rotation: R [D, D], or a Rotation of width D. values: R₂ [W, W] (or a Rotation) that turns each head's values; where
    values cannot be told apart, the report says so and they are left alone. Before online hooks are attached, not after.
    Raises ModelError, with nothing changed, for what roles.py refuses, norms other than RMSNorm (LayerNorm), norms with
    gains behind the block (Gemma 3, OLMo 2) and whatever else does not commute with a turn of the stream.
    """
    rotation = Rotation.of(rotation) if isinstance(rotation, Tensor) else rotation
    values = Rotation.of(values) if isinstance(values, Tensor) else values
    stream = find_stream(model)
    if rotation.width != stream.width:
        raise ModelError(f"the rotation is of width {rotation.width}, the residual stream of width {stream.width}.")
    heads, why = find_values(model, stream.roles, values.width) if values is not None else ([], "left alone")
    tied = stream.roles.tied
    if tied:
        untie(model)
    for path in (stream.roles.embedding, *stream.readers):
        weight = model.get_parameter(f"{path}.weight")
        norm = stream.readers.get(path)
        gain = 1.0 if norm is None else _gain(model, norm, stream.norms[norm])
        change_rows(weight, lambda rows, gain=gain: rotation.apply(rows * gain))
    for path in stream.writers:
        _turn_outputs(model.get_submodule(path), slice(None), rotation.apply)
    for path, rule in stream.norms.items():
        model.get_submodule(path).get_parameter(rule.parameter).fill_(1 - rule.offset)
    if values is not None:
        for layer in heads:
            for start in layer.starts:
                _turn_outputs(model.get_submodule(layer.linear), slice(start, start + layer.width), values.apply)
            change_rows(model.get_parameter(f"{layer.output}.weight").view(-1, layer.width), values.apply)
        if heads:
            why = f"{len(heads[0].starts)} heads of {values.width} in each layer turned by {values.description}"
    counts = len(stream.norms), len(stream.readers) - 1, len(stream.writers)  # the head is a reader
    return RotationReport(rotation.description, stream.width, tied, *counts, why)


def change_rows(weight: Tensor, change: Turn) -> None:
    """weight [R, C] ← change(weight), row by row, in float64, some rows at a time; a view changes what it views."""
    for rows in weight.split(max(1, ELEMENTS // weight.shape[1])):
        rows.copy_(change(rows.double()))


def _turn_outputs(linear: nn.Module, rows: slice, turn: Turn) -> None:
    """What these outputs [O] of a linear were becomes its turn: Rᵀ W and b R."""
    assert isinstance(linear, nn.Linear), type(linear)
    change_rows(linear.weight[rows].T, turn)
    if linear.bias is not None:
        linear.bias[rows].copy_(turn(linear.bias[rows].double()))


def _gain(model: nn.Module, path: str, rule: NormRule) -> Tensor:
    return rule.offset + model.get_submodule(path).get_parameter(rule.parameter).double()
