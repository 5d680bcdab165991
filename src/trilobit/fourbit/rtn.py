"""Round to nearest on uniform grids of 2 to 8 bits: weights with a searched clip, activations token by token.

    symmetric     levels −2^(b−1) … 2^(b−1) − 1,   s = max|x| / (2^(b−1) − 1),   x̂ = s · clip(⌊x/s⌉)
    asymmetric    levels 0 … 2^b − 1,   s = (max − min)/(2^b − 1),   z = ⌊−min/s⌉,   x̂ = s · (clip(⌊x/s⌉ + z) − z)

⌊⌉ rounds half to even. z is whole, so that the last is s · clip(⌊x/s⌉) between −z and 2^b − 1 − z: one operation less. All in
fp32 (float64 stays float64). The search (GPTQ's, as QuaRot and SpinQuant use it): of the ranges p · max, p = 1, 0.99, …,
each row takes the one with the least Σ|x̂ − x|^2.4.

Letters: O outputs, K inputs, G groups of a row, g inputs of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trilobit.fourbit.protocol import Protocol

TINY = 1e-12  # the least scale: rows of zeros stay zeros
LEAST_WEIGHT = 1e-5  # the least max|w| of a row, as the authors' code has it
BLOCK_ELEMENTS = 1 << 16  # of a weight that is searched at once: temporaries stay in the cache of a CPU
DEVICE_ELEMENTS = 1 << 24  # elsewhere, where a small block would not fill the device


@dataclass(frozen=True)
class Grid:
    """Whole levels from `low` to `high`."""

    bits: int
    symmetric: bool

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True)
class Quantizer:
    """Fake quantisation of activations over the last dimension.

    clip: the range is multiplied by it. group: channels that share a scale; None: all. zero_inside: an asymmetric range is
    widened to hold zero.
    """

    grid: Grid
    clip: float = 1.0
    group: int | None = None
    zero_inside: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] → the same shape and dtype, at most 2^bits values in each group. x is left as it is."""
        parts = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.group is not None and self.group < x.shape[-1]:
            parts = parts.unflatten(-1, (-1, self.group))
        if self.grid.symmetric:
            scale = parts.abs().amax(-1, keepdim=True).mul_(self.clip).div_(self.grid.high).clamp_(min=TINY)
            return (parts / scale).round_().clamp_(self.grid.low, self.grid.high).mul_(scale).reshape(x.shape).to(x.dtype)
        low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
        if self.zero_inside:
            low, high = low.clamp_(max=0), high.clamp_(min=0)
        low, high = low.mul_(self.clip), high.mul_(self.clip)
        scale = high.sub_(low).div_(self.grid.high)
        scale = torch.where(scale > 0, scale, low.abs()).clamp_(min=TINY)  # a group of one value is that value
        least = low.div_(scale).neg_().round_().neg_()  # −z
        levels = (parts / scale).round_()
        torch.maximum(levels, least, out=levels)  # maximum and minimum are vectorised; clamp between tensors is not
        torch.minimum(levels, least.add_(self.grid.high), out=levels)
        return levels.mul_(scale).reshape(x.shape).to(x.dtype)


def weight_grid(protocol: Protocol) -> Grid:
    return Grid(protocol.weight_bits, protocol.weight_symmetric)


def weight_scales(weight: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Scale and zero point [O, G] of `weight` [O, K], a short last group allowed. fp32 (float64 of float64), each group's clip
    searched."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    group = protocol.weight_group or weight.shape[1]
    whole = weight.shape[1] // group * group
    most = BLOCK_ELEMENTS if weight.device.type == "cpu" else DEVICE_ELEMENTS
    parts = []
    if whole:
        blocks = weight[:, :whole].unflatten(1, (-1, group)).split(max(1, most // whole))
        parts.append([torch.cat(found) for found in zip(*(_search(block, protocol) for block in blocks), strict=True)])
    if whole < weight.shape[1]:
        parts.append(_search(weight[:, whole:].unsqueeze(1), protocol))
    scale, zero = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    return scale, zero


def _search(weight: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Scale and zero point [O, G] of [O, G, g]."""
    grid = weight_grid(protocol)
    low, high = weight.amin(-1), weight.amax(-1)
    if "weights" in protocol.ranges_with_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    candidates = max(1, int(round(protocol.clip_shrink * protocol.clip_grid, 9))) if protocol.weight_clip == "mse" else 1
    best, best_zero, least = torch.empty(0), torch.empty(0), torch.full_like(low, torch.inf)
    for i in range(candidates):
        share = 1 - i / protocol.clip_grid
        if grid.symmetric:
            scale = torch.maximum(low.abs(), high).clamp(min=LEAST_WEIGHT) * share / grid.high
            zero = torch.zeros_like(scale)
        else:
            scale = (high * share - low * share).clamp(min=LEAST_WEIGHT * share) / grid.high
            zero = (-low * share / scale).round()
        if candidates == 1:
            return scale, zero
        error = _rounded(weight, scale[..., None], zero[..., None], grid)
        error = error.sub_(weight).abs_().pow_(protocol.clip_norm).sum(-1)
        better = error < least
        best = scale if i == 0 else torch.where(better, scale, best)
        best_zero = zero if i == 0 else torch.where(better, zero, best_zero)
        least = torch.minimum(error, least)
    return best, best_zero


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    if grid.symmetric:
        return (x / scale).round_().clamp_(grid.low, grid.high).mul_(scale)
    return (x / scale).round_().add_(zero).clamp_(grid.low, grid.high).sub_(zero).mul_(scale)


def round_weight(weight: Tensor, scale: Tensor, zero: Tensor, protocol: Protocol) -> Tensor:
    """[O, K] on the grids of weight_scales: the same dtype, the nearest level of each."""
    group = protocol.weight_group or weight.shape[1]
    if scale.shape[1] > 1:
        scale, zero = (x.repeat_interleave(group, 1)[:, : weight.shape[1]] for x in (scale, zero))
    x = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return _rounded(x, scale, zero, weight_grid(protocol)).to(weight.dtype)


def round_to_nearest(weight: Tensor, protocol: Protocol) -> Tensor:
    """[O, K] → the fake-quantised weight."""
    return round_weight(weight, *weight_scales(weight, protocol), protocol)
