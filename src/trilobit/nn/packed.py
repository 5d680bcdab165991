"""Frozen ternary modules for inference: codes and scales instead of latent weights.

Codes are kept as int8: torch's integer product reads them directly. On a CPU with the native kernels, and on a GPU with
Triton, they are also packed, at the first use, in the layout that those read. On disk they take two bits (formats.py).
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilobit import quant
from trilobit.errors import ModelError
from trilobit.kernels.frozen_linear import frozen_linear, pack_codes, packs
from trilobit.nn.ternary import InputRMSNorm, TernaryEmbedding, TernaryLinear
from trilobit.quant import Granularity


class Together(Protocol):
    """What computes the outputs of linears that read the same input: siblings.Siblings."""

    def output_of(self, linear: "PackedLinear", input: Tensor) -> Tensor | None:
        """[..., O of this one] in input's dtype; None where it is to compute its own."""
        ...


class PackedLinear(nn.Module):
    """The function of a TernaryLinear at λ = 1. [..., K] → [..., O], computed in fp32, in the input's dtype.

    codes: [O, K] int8; scale: as quant.absmean_scale; bias: [O] or None; rms_norm: the norm in front, or None.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, rms_norm: InputRMSNorm | None,
        granularity: Granularity, int8_activations: bool,
    ):  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.granularity: Granularity = granularity
        self.int8_activations = int8_activations
        self.rms_norm = rms_norm
        self.codes = nn.Buffer(codes)
        self.scale = nn.Buffer(scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._packed: tuple[Tensor, int | None, Tensor] | None = None  # the codes, their version, what they were packed to
        self.siblings: Together | None = None  # that read the same input, this one among them

    @classmethod
    def from_ternary(cls, linear: TernaryLinear) -> "PackedLinear":
        """Freeze a trained linear: quantise its latent weight once."""
        rule, (codes, scale), bias = linear.rule, linear.quantized(), linear.total_bias()
        bias = None if bias is None else bias.detach()
        return cls(codes, scale, bias, linear.rms_norm, rule.granularity, rule.int8_activations)

    def to_ternary(self) -> TernaryLinear:
        """The trainable linear at λ = 1 of the same function, with quant.latent_weight for its latents. Raises ModelError if
        the scales are none that training gives."""
        weight = _latents(self.codes, self.scale, self.granularity)
        with torch.device("meta"):
            linear = TernaryLinear(
                self.in_features, self.out_features, self.bias is not None,
                granularity=self.granularity, int8_activations=self.int8_activations, norm=None,
            )  # fmt: skip
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().float())
        if self.rms_norm is not None:
            linear.rms_norm = self.rms_norm
            linear.rule = replace(linear.rule, eps=self.rms_norm.eps)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):  # else it would round the integer sums to bf16
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        gain, eps = (None, 0.0) if self.rms_norm is None else (self.rms_norm.weight, self.rms_norm.eps)
        if not self.int8_activations:
            x = input if gain is None else quant.rms_norm(input.float(), gain, eps)
            weight = quant.ternary_dequantize(self.codes, self.scale, self.granularity)
            return F.linear(x.float(), weight, self.bias).to(input.dtype)
        if self.siblings is not None and (output := self.siblings.output_of(self, input)) is not None:
            return output
        rows = input.reshape(-1, self.in_features)
        rows = rows.float() if gain is not None and rows.dtype == torch.float64 else rows
        packed = self._packed_codes(rows)
        y = frozen_linear(rows, self.codes, packed, self.scale, self.bias, self.granularity, gain, eps)
        return y.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def _packed_codes(self, rows: Tensor) -> Tensor | None:
        """The codes as the kernels for such rows read them, packed again if they have changed; None where torch computes.

        A compiled graph does not ask for changes (the compiler cannot trace the question): codes are frozen there.
        """
        if not packs(rows):
            return None
        compiling, packed = torch.compiler.is_compiling(), self._packed
        if packed is None or packed[0] is not self.codes or not (compiling or packed[1] == self._version()):
            packed = self.keep_packed(pack_codes(self.codes, self.granularity))
        return packed[2]

    def keep_packed(self, packed: Tensor) -> tuple[Tensor, int | None, Tensor]:
        """Read `packed`, pack_codes of the codes as they are, until they change."""
        self._packed = self.codes, self._version(), packed
        return self._packed

    def _version(self) -> int | None:
        return None if torch.compiler.is_compiling() or self.codes.is_inference() else self.codes._version

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "siblings": None}  # a copy has other codes, and other siblings

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scale per {self.granularity}"


class PackedEmbedding(nn.Module):
    """Rows of code · s. codes: [V, D] int8; scale as quant.absmean_scale. Returns fp32."""

    def __init__(self, codes: Tensor, scale: Tensor, granularity: Granularity):
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape
        self.granularity: Granularity = granularity
        self.codes = nn.Buffer(codes)
        self.scale = nn.Buffer(scale)

    @classmethod
    def from_ternary(cls, embedding: TernaryEmbedding) -> "PackedEmbedding":
        scale = quant.absmean_scale(embedding.weight, embedding.granularity)
        return cls(quant.ternary_codes(embedding.weight, scale, embedding.granularity), scale, embedding.granularity)

    def to_ternary(self) -> TernaryEmbedding:
        """As PackedLinear.to_ternary."""
        with torch.device("meta"):
            embedding = TernaryEmbedding(self.num_embeddings, self.embedding_dim)
        embedding.weight = nn.Parameter(_latents(self.codes, self.scale, self.granularity))
        embedding.granularity = self.granularity
        embedding.set_strength(1.0, 1.0)
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        ids = input.flatten()
        scale = self.scale if self.granularity == "tensor" else self.scale[ids]
        return quant.ternary_dequantize(self.codes[ids], scale, self.granularity).view(*input.shape, self.embedding_dim)


def _latents(codes: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    weight = quant.latent_weight(codes, scale, granularity)
    given = quant.ternary_dequantize(codes, scale, granularity)
    if not torch.equal(quant.ternary_quantize(weight, granularity), given):
        raise ModelError(
            f"no weights in training give the stored scales (one per {granularity}): they are below {quant.FLOOR:g}, or group "
            "scales that are no fp16 numbers. The model can be run and measured, not tuned."
        )
    return weight
