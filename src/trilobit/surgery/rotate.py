"""rotate: turn the residual stream of a decoder by an orthogonal matrix, fused into the weights (QuaRot, arXiv 2404.00456).

    embedding, and every linear that writes to the stream        E ← E R      W ← Rᵀ W,  b ← b R
    every linear that reads it through a norm with gain g        W ← W diag(g) R         and g ← 1
    optional, by head: values V, and what reads the attention    W_v ← R₂ᵀ W_v,  b_v ← b_v R₂      W_o ← W_o R₂

No logit changes: x R has the length of x, so RMSNorm without gains commutes with R, and every W meets R Rᵀ = I. The
embeddings are not centred: that is exact for LayerNorm and wrong for RMSNorm. A tied head is untied, because the final
gain is folded into the head alone. Everything is computed in float64 and rounded once to the weights' dtype.

Who reads and who writes is found by watching the model run, and proven before a weight is touched (stream.py).

A rotated model of low precision rounds outliers into all channels: rotate in fp32 where a model has massive activations.

Letters: D width of the stream, W head dimension; [R, C] any rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.surgery.outlier_safe import untie
from trilobit.surgery.stream import ValueHeads, find_stream, find_values

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
    values cannot be told apart, the report says so and they are left alone (so behind a transform across heads, which has to
    be attached after this). Rotations of a model that is rotated already compose.
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
    ends = {path: layer for layer in heads for path in (layer.linear, layer.output)}
    change_rows(model.get_parameter(f"{stream.roles.embedding}.weight"), rotation.apply)
    for path, norm in stream.readers.items():
        rule = stream.norms[norm]
        gain = rule.offset + model.get_submodule(norm).get_parameter(rule.parameter).double()
        _rewrite_reader(model.get_submodule(path), lambda w, gain=gain: rotation.apply(w * gain), ends.get(path), values)
    for path in stream.writers:
        _rewrite_writer(model.get_submodule(path), rotation.apply, ends.get(path), values)
    for path, rule in stream.norms.items():
        model.get_submodule(path).get_parameter(rule.parameter).fill_(1 - rule.offset)
    if values is not None and heads:
        why = f"{len(heads[0].starts)} heads of {values.width} in each layer turned by {values.description}"
    counts = len(stream.norms), len(stream.readers) - 1, len(stream.writers)  # the head is a reader
    return RotationReport(rotation.description, stream.width, tied, *counts, why)


def change_rows(weight: Tensor, change: Turn) -> None:
    """weight [R, C] ← change(weight), which works row by row, in float64, some rows at a time."""
    for rows in weight.split(max(1, ELEMENTS // weight.shape[1])):
        rows.copy_(change(rows.double()))


def _rewrite_reader(linear: Any, change: Turn, heads: ValueHeads | None, values: Rotation | None) -> None:
    """W ← change(W), and then, where its outputs hold values, these heads' rows turned: R₂ᵀ W and b R₂."""
    if heads is None or values is None:
        return change_rows(linear.weight, change)
    weight = change(linear.weight.double())
    for start in heads.starts:
        rows = slice(start, start + heads.width)
        weight[rows] = values.apply(weight[rows].T).T
        if linear.bias is not None:
            linear.bias[rows] = values.apply(linear.bias[rows].double()).to(linear.bias)
    linear.weight.copy_(weight)


def _rewrite_writer(linear: Any, turn: Turn, heads: ValueHeads | None, values: Rotation | None) -> None:
    """W ← Rᵀ W, b ← b R, and where it reads mixtures of values, each head of W's columns times R₂."""
    weight = turn(linear.weight.double().T).T
    if heads is not None and values is not None:
        weight = values.apply(weight.unflatten(1, (-1, heads.width))).flatten(1)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(turn(linear.bias.double()))
