"""Frozen ternary modules for inference: codes and scales instead of latent weights.

Codes are kept as int8 so that the integer product can read them directly; on disk they take two bits (formats.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilobit import quant
from trilobit.kernels.dispatch import integer_linear
from trilobit.nn.ternary import InputRMSNorm, TernaryEmbedding, TernaryLinear
from trilobit.quant import Granularity


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

    @classmethod
    def from_ternary(cls, linear: TernaryLinear) -> "PackedLinear":
        """Freeze a trained linear: quantise its latent weight once."""
        rule, (codes, scale), bias = linear.rule, linear.quantized(), linear.total_bias()
        bias = None if bias is None else bias.detach()
        return cls(codes, scale, bias, linear.rms_norm, rule.granularity, rule.int8_activations)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):  # else it would round the integer sums to bf16
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        x = input if self.rms_norm is None else quant.rms_norm(input.float(), self.rms_norm.weight, self.rms_norm.eps)
        if not self.int8_activations:
            weight = quant.ternary_dequantize(self.codes, self.scale, self.granularity)
            return F.linear(x.float(), weight, self.bias).to(input.dtype)
        codes, scale = quant.int8_codes(x)
        rows, scales = codes.reshape(-1, self.in_features), scale.reshape(-1, 1)
        y = integer_linear(rows, scales, self.codes, self.scale, self.granularity)
        y = y if self.bias is None else y.add_(self.bias)
        return y.to(input.dtype).view(*input.shape[:-1], self.out_features)

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

    def forward(self, input: Tensor) -> Tensor:
        ids = input.flatten()
        scale = self.scale if self.granularity == "tensor" else self.scale[ids]
        return quant.ternary_dequantize(self.codes[ids], scale, self.granularity).view(*input.shape, self.embedding_dim)
