"""A model whose norms compute in its own dtype: the stock ones go through fp32, which hides errors below 1e-7."""

from torch import nn
from transformers import PreTrainedModel

from trilobit.surgery.outlier_safe import find_norms


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """`model` in float64 throughout, in place."""
    model.double()
    for path, rule in find_norms(model).items():
        weight = rule.offset + model.get_submodule(path).get_parameter(rule.parameter).detach()
        norm = nn.RMSNorm(len(weight), eps=rule.eps)
        norm.weight = nn.Parameter(weight)
        model.set_submodule(path, norm)
    return model
