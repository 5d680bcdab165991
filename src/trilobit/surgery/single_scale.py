"""Block norms that stay single-scale while a model is tuned with scalar gains.

`fold` leaves the single-scale norms of an outlier-safe model as stock norms whose gains are one constant. Two norms in a
row are one as long as the first keeps it (docs/math.md, "Two norms in a row"): then the norm with one gain that `--placement
every` puts in front of q, k, v, gate and up is a factor on their weight scales, and llama.cpp's `bitnet` graph holds the model.
Trained channel by channel the gains part, and no graph does. So those block norms are trained as what they were, one scale
each, and are stock norms again before anything is written.
"""

import torch
from torch import Tensor, nn

from trilobit.nn.outlier_safe import SingleScaleRMSNorm
from trilobit.surgery.outlier_safe import probe_norm
from trilobit.surgery.ternary import Plan
from trilobit.tensors import whole


def single_scale_norms(model: nn.Module, plan: Plan) -> list[str]:
    """Paths of the block norms in front of inserted norms with one gain, if each of them has exactly the same gain in all
    channels; else none: where one has not, there are two norms in a row that are not one anyway. Of a model in parts every
    rank has to ask."""
    if plan.spec.gain != "scalar":
        return []
    paths = list(
        dict.fromkeys(linear.fed_by for linear in plan.linears.values() if linear.normed and linear.fed_by is not None)
    )
    for path in paths:
        norm = model.get_submodule(path)
        rule = probe_norm(norm)
        if rule is None:
            return []
        gain = whole(norm.get_parameter(rule.parameter))
        if not bool((gain == gain[0]).all()):
            return []
    return paths


@torch.no_grad()
def hold_single_scales(model: nn.Module, paths: list[str]) -> dict[str, nn.Module]:
    """Put a SingleScaleRMSNorm of the same function in the place of each stock norm, in place; the stock norms by path."""
    held = {}
    for path in paths:
        norm = held[path] = model.get_submodule(path)
        rule = probe_norm(norm)
        assert rule is not None, path
        (weight,) = norm.parameters()
        single = SingleScaleRMSNorm(rule.eps, device=weight.device, dtype=weight.dtype)
        single.weight.copy_(single_scale(norm))
        model.set_submodule(path, single.train(norm.training))
    return held


@torch.no_grad()
def single_scale(norm: nn.Module) -> Tensor:
    """The gain, [1], of a stock norm that has the same in all channels."""
    rule = probe_norm(norm)
    assert rule is not None, type(norm)
    return rule.offset + whole(norm.get_parameter(rule.parameter))[:1]


@torch.no_grad()
def stock_gain(norm: nn.Module, scale: Tensor) -> Tensor:
    """The parameter, [K], of a stock norm that is to have the gain `scale`, [1], in all channels."""
    rule = probe_norm(norm)
    assert rule is not None, type(norm)
    return (scale - rule.offset).expand(norm.get_parameter(rule.parameter).shape)


@torch.no_grad()
def release_single_scales(model: nn.Module, held: dict[str, nn.Module]) -> None:
    """Put the stock norms back, in place, with the scales that were trained in all channels."""
    for path, norm in held.items():
        single = model.get_submodule(path)
        assert isinstance(single, SingleScaleRMSNorm), path
        (weight,) = norm.parameters()
        weight.copy_(stock_gain(norm, single.weight))
        model.set_submodule(path, norm.train(single.training))
