"""All quantisation arithmetic: the oracle that every kernel, layout and engine is tested against.

    weights      s = mean|W| over a granule (the matrix, a row, or a group along the input)
                 code = clip(round_half_even(W · 1/s), −1, 1)                      BitNet b1.58, arXiv 2402.17764, eq. 1–3
    activations  s = absmax/127 per token, code = clip(round_half_even(x · (127 · 1/absmax)), −128, 127)
    strength     λ = 0 is x itself, λ = 1 is Q(x) itself, between them x + λ·(Q(x) − x); the gradient passes straight through
    product      y = (Σ code_x · code_w) · (s_x · s_w) + b, the sum exact, the rest in fp32

Means are taken in float64 and rounded once, so that a scale does not depend on how a matrix is sharded; means and absmax
are clamped at 1e-5. Group scales are rounded to fp16 in the forward, because the formats that hold groups store fp16.
torch (hence transformers) computes 127 / absmax as 1/absmax, rounded, times 127: a kernel has to repeat both roundings.
A float64 input is computed in float64 throughout (for parity tests); everything else in float32.

Letters: O outputs, K inputs, G groups of a row, T tokens.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "row", "group-64", "group-128", "group-256"]

FLOOR = 1e-5
INT8_MAX = 127
EXACT_IN_FP32 = 2**24 // INT8_MAX  # widest K whose ternary × int8 sums fp32 holds exactly


def group_size(granularity: Granularity) -> int | None:
    """Inputs per group, or None for `tensor` and `row`."""
    return int(granularity.removeprefix("group-")) if granularity.startswith("group-") else None


def absmean_scale(weight: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Scale of each granule of a logical matrix.

    weight: [O, K]. Returns [1, 1], [O, 1] or [O, G] with G = ceil(K / group), fp32 (float64 for a float64 weight).
    A short last group is a granule like any other. NaN and infinity propagate into the scale.
    """
    dtype = working_dtype(weight)
    group = group_size(granularity)
    magnitude = weight.detach().abs()
    if granularity == "tensor":
        mean = magnitude.mean(dtype=torch.float64).reshape(1, 1)
    elif group is None:
        mean = magnitude.mean(dim=1, keepdim=True, dtype=torch.float64)
    else:
        whole = weight.shape[1] // group * group
        parts = [magnitude[:, :whole].unflatten(1, (-1, group)).mean(dim=2, dtype=torch.float64)] if whole else []
        if whole < weight.shape[1]:
            parts.append(magnitude[:, whole:].mean(dim=1, keepdim=True, dtype=torch.float64))
        mean = torch.cat(parts, dim=1)
    scale = mean.to(dtype).clamp(min=FLOOR)
    return scale if group is None else _round_to_fp16(scale)


@torch.library.custom_op("trilobit::round_to_fp16", mutates_args=())
def _round_to_fp16(x: Tensor) -> Tensor:
    """x rounded to fp16, in x's dtype. An operator of its own, because inductor (torch 2.13) drops a cast there and back."""
    return x.to(torch.float16).to(x.dtype)


@_round_to_fp16.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def spread_scale(scale: Tensor, inputs: int, granularity: Granularity) -> Tensor:
    """Repeat group scales along the input: [O, G] → [O, K]. Tensor and row scales already broadcast and come back as is."""
    group = group_size(granularity)
    if group is None:
        return scale
    # An index rather than repeat_interleave and a slice: inductor (torch 2.13) reads that past the end of a short group.
    return scale[:, torch.arange(inputs, device=scale.device) // group]


def ternary_levels(weight: Tensor, scale: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Codes −1, 0, 1 of `weight` [O, K] in the dtype of `scale`, which comes from absmean_scale."""
    reciprocal = spread_scale(scale.reciprocal(), weight.shape[1], granularity)
    return (weight.detach() * reciprocal).round_().clamp_(-1, 1)


def ternary_codes(weight: Tensor, scale: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """ternary_levels as int8."""
    return ternary_levels(weight, scale, granularity).to(torch.int8)


def ternary_dequantize(codes: Tensor, scale: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """code · s, [O, K] in the dtype of `scale`."""
    return codes.to(scale.dtype).mul_(spread_scale(scale, codes.shape[1], granularity))


def ternary_quantize(weight: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Q(W): the nearest ternary matrix under the absmean rule, [O, K] in the dtype of absmean_scale."""
    scale = absmean_scale(weight, granularity)
    return ternary_levels(weight, scale, granularity).mul_(spread_scale(scale, weight.shape[1], granularity))


def latent_weight(codes: Tensor, scale: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """A weight W [O, K] fp32 with ternary_codes(W) = codes and absmean_scale(W) = scale: where training goes on from codes.

    code · s alone would shrink: its mean is s · p, p being the share of codes that are not zero. So W = code · s/p, in
    floating point a little below it; what the granule's mean then lacks goes to its first non-zeros, one last bit each, and the
    rest to its first zero. (fp16 group scales need none of that.) No W has a scale below FLOOR, or a group scale that is no
    fp16 value: there the result has other scales. A granule of zeros stays zero.
    """
    group = group_size(granularity)
    if group is not None:
        parts = codes.split(group, dim=1)
        share = torch.stack([(part != 0).mean(dim=1, dtype=torch.float64) for part in parts], dim=1)
        return ternary_dequantize(codes, (scale / share.clamp(min=1 / group)).float(), granularity)
    granules = codes.reshape(-1 if granularity == "row" else 1, codes.shape[1] if granularity == "row" else codes.numel())
    wanted = scale.reshape(-1, 1).double() * granules.shape[1]
    nonzero = granules != 0
    count = nonzero.sum(dim=1, keepdim=True)
    below = (wanted / count.clamp(min=1)).float()
    below = torch.where(below.double() * count > wanted, torch.nextafter(below, torch.zeros_like(below)), below)
    step = torch.nextafter(below, torch.full_like(below, torch.inf)) - below
    lacking = wanted - below.double() * count
    raised = (lacking / step).floor().long()
    weight = granules * torch.where(nonzero.cumsum(dim=1) <= raised, below + step, below)
    rest = (lacking - raised * step.double()).float() * (count > 0)
    first_zero = (~nonzero).int().argmax(dim=1, keepdim=True)
    weight.scatter_add_(1, first_zero, torch.where(nonzero.all(dim=1, keepdim=True), 0, rest))
    return weight.view(codes.shape)


def dead_zone_sum(weight: Tensor, granularity: Granularity) -> Tensor:
    """Sum over each row of the weights whose code is 0, [O]; their gradient is one, the others' zero.

    Tequila (arXiv 2509.23809) adds a small multiple of it to the output: weights that quantise to zero are heard again.
    """
    codes = ternary_levels(weight, absmean_scale(weight, granularity), granularity)
    return (weight * (codes == 0)).sum(dim=1)


LEARNED_STEPS = 1.5
"""ParetoQ's ternary levels are −2/3, 0, 2/3 of its range α: the scale is α / 1.5."""


def learned_quantize(weight: Tensor, ranges: Tensor) -> Tensor:
    """ParetoQ's ternary weight, arXiv 2502.02631 (stretched elastic quantisation): α · 2/3 · code, [O, K].

    weight: [O, K]; ranges: [O, 1], the learnable α of each row, clamped at 1e-5. The code is that of scale α / 1.5. With
    r = W/α, the weight's gradient passes where |r| ≤ 1, and ∂Q/∂α = 2/3 · code − r there, sign(r) beyond, times
    1/√(O·K), as in LSQ (arXiv 1902.08153).
    """
    return _LearnedQuantize.apply(weight, ranges)


class _LearnedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ranges: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ranges)
        scale = learned_scale(ranges)
        return ternary_levels(weight, scale, "row").mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, ranges = ctx.saved_tensors
        (gradient,) = gradients
        scale = learned_scale(ranges)
        ratio = weight / (scale * LEARNED_STEPS)
        inside = ratio.abs() <= 1
        slope = torch.where(inside, ternary_levels(weight, scale, "row") / LEARNED_STEPS - ratio, ratio.sign())
        return gradient * inside, (gradient * slope).sum(dim=1, keepdim=True) / weight.numel() ** 0.5


def learned_scale(ranges: Tensor) -> Tensor:
    """s = α / 1.5 of each row, [O, 1]."""
    return ranges.detach().clamp(min=FLOOR) / LEARNED_STEPS


def int8_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x` [..., K] and the scale of each token [..., 1], both fp32 (float64 for float64).

    127/absmax is what torch computes for it, the reciprocal times 127 (two roundings), as transformers does.
    """
    values = x.detach().to(working_dtype(x))
    absmax = torch.maximum(values.amax(dim=-1, keepdim=True), values.amin(dim=-1, keepdim=True).neg_()).clamp_(min=FLOOR)
    limit = absmax.new_full((), INT8_MAX)  # a tensor: by a number, CUDA multiplies with a reciprocal that is rounded first
    return (values * (INT8_MAX / absmax)).round_().clamp_(-INT8_MAX - 1, INT8_MAX), absmax / limit


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8_levels with the codes as int8."""
    levels, scale = int8_levels(x)
    return levels.to(torch.int8), scale


def int8_quantize(x: Tensor) -> Tensor:
    """Q(x): the nearest int8 token under the absmax rule, same shape, fp32 (or float64 for float64)."""
    levels, scale = int8_levels(x)
    return levels.mul_(scale)


def integer_linear(
    codes: Tensor, scale: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None, granularity: Granularity
) -> Tensor:
    """y = (Σ code_x · code_w) · (s_x · s_w) + b. The definition of the linear at λ = 1.

    codes [..., K] int8, scale [..., 1]; weight_codes [O, K] int8, weight_scale from absmean_scale; bias [O] or None.
    Returns [..., O] in the dtype of `scale`. With groups, each group's exact sum is scaled before the groups are added.
    """
    dtype = scale.dtype
    exact = dtype if codes.shape[-1] <= EXACT_IN_FP32 else torch.float64
    group = group_size(granularity)
    if group is None:
        sums = (codes.to(exact) @ weight_codes.to(exact).T).to(dtype)
        y = sums * (scale * weight_scale.T)
    else:
        y = torch.zeros(*codes.shape[:-1], weight_codes.shape[0], dtype=dtype, device=codes.device)
        for index in range(weight_scale.shape[1]):
            part = slice(index * group, (index + 1) * group)
            sums = (codes[..., part].to(exact) @ weight_codes[:, part].to(exact).T).to(dtype)
            y += sums * weight_scale[:, index]
        y *= scale
    return y if bias is None else y + bias.to(dtype)


def fade(x: Tensor, quantized: Tensor, strength: float | Tensor) -> Tensor:
    """x at λ = 0, Q(x) at λ = 1, x + λ·(Q(x) − x) between them; the gradient goes to x unchanged.

    A tensor strength is taken to lie strictly between 0 and 1 (branching on it would wait for the device).
    """
    return _StraightThrough.apply(x, quantized, strength)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, strength: float | Tensor) -> Tensor:
        return blend(x, quantized, strength)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


def blend(x: Tensor, quantized: Tensor, strength: float | Tensor) -> Tensor:
    """The forward of `fade`, without its gradient."""
    if isinstance(strength, float | int):
        if strength == 0:
            return x.view_as(x)
        if strength == 1:
            return quantized.to(x.dtype, copy=quantized.dtype == x.dtype)
        strength = torch.tensor(strength, dtype=quantized.dtype, device=quantized.device)
    return torch.lerp(x.to(quantized.dtype), quantized, strength.to(quantized.dtype)).to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · gain over the last dimension, computed in fp32 (float64 for float64), in x's dtype.

    gain: [K] (vector) or [1] (scalar). Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4.
    """
    values = x.to(working_dtype(x))
    normed = values * torch.rsqrt(values.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (normed * gain).to(x.dtype)


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
