"""Models as a training run starts from them: random matrices and biases, every norm's gain still constant."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import COMMON, FAMILIES
from trilobit.nn.outlier_safe import EmbeddingProjection, SingleScaleRMSNorm


def fresh(family: str, *, tied: bool = False, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fp32 model of `family` in eval mode. Biases are not zero: a model whose biases are zero cannot notice a lost one."""
    settings = {**COMMON, **FAMILIES.get(family, {}), "tie_word_embeddings": tied, **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def train_away(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """Give outlier-safe parts values that training could: scales of either sign, projections that are not orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    signs = 0
    for module in model.modules():
        if isinstance(module, SingleScaleRMSNorm):
            signs += 1
            module.weight.fill_((torch.rand(1, generator=generator).item() + 0.3) * (-1) ** (signs % 2))
        elif isinstance(module, EmbeddingProjection):
            width = module.in_features
            module.weight.copy_(torch.randn(width, width, generator=generator) / width**0.5)
    return model


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
