"""The ternary linear as one autograd function: norm, both quantisers, product, and the straight-through backward.

The same numbers as composing quant.py step by step (the oracle in tests/), for about the time and memory of the plain
linear it replaces. What pays for the quantisers:

  · at λ = 1 the forward product is int8 × ternary, exact, on int8 instructions (about twice the bf16 rate);
  · at λ = 1 the backward keeps int8 codes (one byte) where a plain linear keeps its bf16 or fp32 input and weight;
  · the norm, and in fp32 the blends, are computed again from the saved input rather than kept;
  · on a GPU norm and quantiser are one kernel, the product with its scales, bias and cast another, the norm's backward a third
    (kernels/gpu.py); weights that do not change between micro-batches are quantised once (`quantized`).

With x̂ = x · r, r = 1/rms(x), n = x̂ · g, and the straight-through estimator (identity through both roundings):

    ∂W = ∂yᵀ · Q(n)       ∂n = ∂y · Q(W)       ∂g = Σ_t ∂n · x̂       ∂x = r · (∂n·g − x̂ · mean(∂n·g·x̂))

Letters: T tokens, K inputs, O outputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilobit import quant
from trilobit.kernels import gpu
from trilobit.kernels.dispatch import integer_linear, ternary_codes
from trilobit.quant import Granularity

Strength = float | Tensor
"""λ. A float is 0 or 1; a 0-dim tensor lies strictly between, so that changing it neither recompiles nor waits."""


@dataclass(frozen=True)
class Rule:
    """What is fixed about a ternary linear: the granule of its scale, whether its input becomes int8, its norm's eps."""

    granularity: Granularity
    int8_activations: bool
    eps: float


def ternary_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, rule: Rule, weights: Strength, activations: Strength,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Q_λ(rms_norm(x) · gain) · Q_λ(W)ᵀ + b, straight-through.

    x: [..., K]; weight: [O, K] latent; bias: [O] or None; gain: [K], [1] or None (no norm).
    weights, activations: λ_w and λ_a. quantized: codes and scale of the weight as it is, where known.
    Returns [..., O] in the autocast dtype if autocast is on, else in x's dtype.
    """
    kind = x.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not rule.int8_activations:
        activations = 0.0
    with torch.autocast(kind, enabled=False):
        rows = x.reshape(-1, x.shape[-1])  # here, because the compiler loses a view that is made and saved inside
        y = _TernaryLinear.apply(rows, weight, bias, gain, rule, weights, activations, compute, *(quantized or (None, None)))
    return y.view(*x.shape[:-1], weight.shape[0])


def _is(strength: Strength, value: float) -> bool:
    return not isinstance(strength, Tensor) and strength == value


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None,
        rule: Rule, weights: Strength, activations: Strength, compute: torch.dtype,
        weight_codes: Tensor | None, weight_scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # A scale per tensor or row factors out of the product; then the codes alone, exact in any dtype, are multiplied.
        pure_weights = _is(weights, 1) and quant.group_size(rule.granularity) is None
        codes = scale = inputs = matrix = None
        if _is(weights, 0):
            weight_codes = weight_scale = None
        elif weight_scale is None:
            weight_scale = quant.absmean_scale(weight, rule.granularity)
        if weight_scale is not None and weight_codes is None and (pure_weights or (_is(weights, 1) and _is(activations, 1))):
            weight_codes = ternary_codes(weight, weight_scale, rule.granularity)

        if weight_codes is not None and weight_scale is not None and _is(weights, 1) and _is(activations, 1):
            codes, scale, inverse = _norm_quantize(rows, gain, rule.eps)
            y = integer_linear(codes, scale, weight_codes, weight_scale, bias, rule.granularity, compute)
        elif weight_codes is not None and weight_scale is not None and pure_weights:
            inverse, normed = _norm(rows, gain, rule.eps)
            inputs, codes, scale = _make_inputs(normed, activations, compute)
            y = (inputs @ weight_codes.to(compute).T) * weight_scale.T
            y = y if bias is None else y.add_(bias)
        else:
            inverse, normed = _norm(rows, gain, rule.eps)
            inputs, codes, scale = _make_inputs(normed, activations, compute)
            matrix, weight_codes = _make_matrix(weight, weight_scale, weights, rule, compute)
            y = F.linear(inputs, matrix, None if bias is None else bias.to(compute))  # λ = 0: the plain linear's own bits

        # A half-precision operand is kept as it is, like a plain linear's under autocast; an fp32 one is made again.
        if compute.itemsize > 2:
            inputs = matrix = None
        saved = None if gain is None and (_is(activations, 1) or inputs is not None) else rows
        ctx.save_for_backward(saved, weight, gain, inverse, codes, scale, weight_codes, weight_scale, inputs, matrix)
        ctx.rule, ctx.strengths, ctx.pure_weights, ctx.compute = rule, (weights, activations), pure_weights, compute
        ctx.on_gpu = gpu.runs_on(rows)
        ctx.dtype, ctx.bias_dtype = rows.dtype, None if bias is None else bias.dtype
        return y.to(compute)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, weight, gain, inverse, codes, scale, weight_codes, weight_scale, inputs, matrix = ctx.saved_tensors
        rule, (weights, activations), compute = ctx.rule, ctx.strengths, ctx.compute
        dy = gradients[0].to(compute)
        dx = dweight = dbias = dgain = None

        if ctx.needs_input_grad[1]:
            if inputs is None and _is(activations, 1):
                inputs = codes.to(scale.dtype).mul_(scale).to(compute)
            elif inputs is None:
                inputs = _blend_activations(_apply_norm(rows, inverse, gain), codes, scale, activations, compute)
            dweight = (dy.T @ inputs).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(dim=0, dtype=quant.working_dtype(dy)).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            if matrix is None:
                matrix = _blend_weights(weight, weight_codes, weight_scale, weights, rule, compute, ctx.pure_weights)
            per_tensor = ctx.pure_weights and weight_scale.numel() == 1
            left = dy * weight_scale.T.to(compute) if ctx.pure_weights and not per_tensor else dy
            dnormed = left @ matrix
            if gain is not None and ctx.on_gpu and dnormed.dtype in gpu.DTYPES:
                dx, dgain = gpu.norm_backward(rows, inverse, gain, dnormed, weight_scale if per_tensor else None)
            else:
                dnormed = dnormed.to(quant.working_dtype(dy))
                if per_tensor:
                    dnormed *= weight_scale
                dx, dgain = (dnormed, None) if gain is None else _norm_backward(rows, inverse, gain, dnormed)
            dx = dx.to(ctx.dtype)
        return dx, dweight, dbias, dgain, None, None, None, None, None, None


def _norm_quantize(rows: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and scales of the normed rows, and 1/rms where there is a norm."""
    if gpu.runs_on(rows):
        return gpu.norm_quantize(rows, gain, eps)
    inverse, normed = _norm(rows, gain, eps)
    return *quant.int8_codes(normed), inverse


def _norm(rows: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor | None, Tensor]:
    """1/rms, and the normed rows in the working dtype; without a gain None and the rows."""
    inverse = None if gain is None else _inverse_rms(rows, eps)
    return inverse, _apply_norm(rows, inverse, gain)


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps): [T, K] → [T, 1]."""
    values = rows.to(quant.working_dtype(rows))
    return torch.rsqrt(values.pow(2).mean(dim=-1, keepdim=True) + eps)


def _apply_norm(rows: Tensor, inverse: Tensor | None, gain: Tensor | None) -> Tensor:
    """x̂ · g in the working dtype, [T, K]; without a norm the rows themselves."""
    values = rows.to(quant.working_dtype(rows))
    return values if inverse is None or gain is None else (values * inverse).mul_(gain)


def _make_inputs(normed: Tensor, strength: Strength, compute: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Q_λ(n) in the compute dtype, and the codes and scale to make it again from where that is fp32 or wider."""
    if _is(strength, 0):
        return normed.to(compute), None, None
    levels, scale = quant.int8_levels(normed)
    codes = levels.to(torch.int8) if compute.itemsize > 2 else None
    inputs = quant.blend(normed, levels.mul_(scale), strength).to(compute)
    return inputs, codes, None if codes is None else scale


def _make_matrix(
    weight: Tensor, scale: Tensor | None, strength: Strength, rule: Rule, compute: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Q_λ(W) in the compute dtype, and the codes to make it again from where that is fp32 or wider."""
    if scale is None:
        return weight.to(compute), None
    levels = quant.ternary_levels(weight, scale, rule.granularity)
    codes = levels.to(torch.int8) if compute.itemsize > 2 else None
    levels.mul_(quant.spread_scale(scale, weight.shape[1], rule.granularity))
    return quant.blend(weight, levels, strength).to(compute), codes


def _blend_activations(
    normed: Tensor, codes: Tensor | None, scale: Tensor | None, strength: Strength, compute: torch.dtype
) -> Tensor:
    if codes is None or scale is None:
        return normed.to(compute)
    return quant.blend(normed, codes.to(scale.dtype).mul_(scale), strength).to(compute)


def _blend_weights(
    weight: Tensor, codes: Tensor | None, scale: Tensor | None, strength: Strength, rule: Rule, compute: torch.dtype, pure: bool
) -> Tensor:
    """[O, K] in the compute dtype. `pure`: the codes alone (exact in any dtype), because their scale is applied outside."""
    if codes is None or scale is None:
        return weight.to(compute)
    if pure:
        return codes.to(compute)
    return quant.blend(weight, quant.ternary_dequantize(codes, scale, rule.granularity), strength).to(compute)


def _norm_backward(rows: Tensor, inverse: Tensor, gain: Tensor, dnormed: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x̂ · g with respect to x [T, K] and g. `dnormed` is overwritten."""
    normalized = rows.to(dnormed.dtype) * inverse
    product = dnormed * normalized
    if gain.numel() == 1:
        dgain = product.sum().reshape(gain.shape)
        mean = product.mean(dim=-1, keepdim=True) * gain
    else:
        dgain = product.sum(dim=0)
        mean = (product @ gain.to(product.dtype)).unsqueeze(1) / rows.shape[-1]
    dx = dnormed.mul_(gain).sub_(normalized.mul_(mean)).mul_(inverse)
    return dx, dgain.to(gain.dtype)
