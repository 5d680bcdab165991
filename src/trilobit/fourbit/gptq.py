"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) of one matrix on uniform grids.

    min ‖(W − Ŵ) X‖²      H = Σ x xᵀ + damping · mean(diag) · I,    H⁻¹ = Uᵀ U with U upper triangular
    ŵ_j = Q(w_j),    w_k ← w_k − (w_j − ŵ_j) · U_jk / U_jj    for k > j

Columns are quantised one after the other; each one's error is paid for by those to come. Updates are applied at once within a
block of columns and by one product beyond it. Inputs that are never anything but zero lose their weights first, as in the
authors' code. A row's scale comes from what is then there, a group's from what that has become, by every column before it,
when the group begins (the authors leave out those of the block that it begins in). Where H cannot be factorised, damping is
raised tenfold until it can.

Letters: O outputs, K inputs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from trilobit.errors import ModelError
from trilobit.fourbit.protocol import Protocol
from trilobit.fourbit.rtn import weight_grid, weight_scales

MOST_DAMPING = 1e3


def inverse_factor(moment: Tensor, damping: float, where: str = "a linear") -> tuple[Tensor, float]:
    """U [K, K] of H⁻¹ = Uᵀ U, H the damped moment, and the damping that it took. Inputs that are never anything but zero get a
    diagonal of one.

    Raises ModelError that names `where`: for a moment that is not finite, and where no damping helps.
    """
    if not torch.isfinite(moment).all():
        raise ModelError(
            f"{where}: what it reads on the calibration text is not finite, so GPTQ has no Hessian there. The model's weights "
            "are damaged, or its activations overflow: try --precision fp32, or --method rtn."
        )
    damped = moment.clone()
    diagonal = moment.diagonal().clone()
    diagonal[diagonal == 0] = 1
    mean, tried = diagonal.mean(), []
    while damping <= MOST_DAMPING:
        tried.append(f"{damping:g}")
        damped.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor = torch.cholesky_inverse(factor)  # the factor before is let go
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not failed:
                return factor, damping
        del factor
        damping *= 10
    raise ModelError(f"{where}: GPTQ cannot factorise its Hessian with damping of {', '.join(tried)}. Use --method rtn.")


def quantize_columns(
    weight: Tensor, moment: Tensor, protocol: Protocol, where: str = "a linear"
) -> tuple[Tensor, Tensor, float]:
    """The fake-quantised weight [O, K], its scales [O, G] and the damping that it took, for inputs with Σ x xᵀ = `moment`
    [K, K] float64. `weight` is left as it is.

    Computes in fp32, or in float64 if `weight` is. Raises ModelError as inverse_factor.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grid = weight_grid(protocol)
    order = moment.diagonal().argsort(descending=True, stable=True) if protocol.gptq_act_order else None
    dead = moment.diagonal() == 0
    rows = weight.detach().to(dtype).masked_fill(dead, 0)
    if order is not None:
        rows, moment = rows[:, order], moment[order][:, order]
    upper, damping = inverse_factor(moment, protocol.gptq_damping, where)
    upper = upper.to(dtype)
    diagonal = upper.diagonal().tolist()
    columns = rows.T.contiguous()  # [K, O]: a column is contiguous
    result = torch.empty_like(columns)
    scale = zero = columns[0]
    scales = []
    if protocol.weight_group is None:
        scale, zero = (x[:, 0].to(dtype) for x in weight_scales(rows, protocol))
        scales.append(scale)
    for start, end, begins in _blocks(len(columns), protocol):
        if begins:
            group = columns[start : start + (protocol.weight_group or 0)].T
            scale, zero = (x[:, 0].to(dtype) for x in weight_scales(group, protocol))
            scales.append(scale)
        block, errors = columns[start:end], torch.empty_like(columns[start:end])
        low, high = grid.low - zero, grid.high - zero
        for j in range(end - start):
            level = (block[j] / scale).round_()
            torch.maximum(level, low, out=level)
            torch.minimum(level, high, out=level)
            torch.mul(level, scale, out=result[start + j])
            torch.sub(block[j], result[start + j], out=errors[j]).div_(diagonal[start + j])
            block[j + 1 :].addr_(upper[start + j, start + j + 1 : end], errors[j], alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    found = result.T
    if order is not None:
        found = found[:, order.argsort()]
    return found.to(weight.dtype), torch.stack(scales, 1), damping


def _blocks(inputs: int, protocol: Protocol) -> Iterator[tuple[int, int, bool]]:
    """Runs of columns that cross no boundary of a block or a group: start, end, and whether a group begins."""
    group = protocol.weight_group
    start = 0
    while start < inputs:
        end = min(inputs, (start // protocol.gptq_block + 1) * protocol.gptq_block)
        if group is not None:
            end = min(end, (start // group + 1) * group)
        yield start, end, group is not None and start % group == 0
        start = end
