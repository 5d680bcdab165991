"""QuaRot's rotations (arXiv 2404.00456): a randomised Hadamard transform of the residual stream, a plain one of each head.

    R = diag(±1) Hᵀ/√D      the signs drawn from a seed; where width D has no Hadamard matrix, a random orthogonal R
    R₂ = Hᵀ/√W              the same for every head, fused into values and attention output

The Hadamard transform is the rotation that spreads one channel's outlier evenly, to 1/√D of it in every channel; the signs
keep it from piling up what many channels have in common. Residual stream and values are fused into the weights by
surgery/rotate.py; what has to run online is in online.py.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.fourbit.hadamard import constructible, construction, transform
from trilobit.nn.outlier_safe import random_orthogonal
from trilobit.surgery.rotate import Rotation, RotationReport, rotate


def random_rotation(width: int, seed: int = 0) -> Rotation:
    """A randomised Hadamard transform of `width`; where there is none a random orthogonal matrix, as its description says."""
    generator = torch.Generator().manual_seed(seed)
    if not constructible(width):
        matrix = random_orthogonal(width, generator)
        found = f"a random orthogonal matrix (no Hadamard matrix of {width} can be constructed), seed {seed}"
        return Rotation(width, lambda x: x @ matrix.to(x), found)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return Rotation(
        width, lambda x: transform(x * signs.to(x)), f"a Hadamard matrix ({construction(width)}) with signs, seed {seed}"
    )


def head_rotation(width: int) -> Rotation:
    """The Hadamard transform of one head. Raises UnsupportedError for a head width that no construction reaches."""
    return Rotation(width, transform, f"a Hadamard matrix ({construction(width)})")


def head_width(model: PreTrainedModel) -> int:
    """Channels of one attention head, from the model's config."""
    config: Any = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def matrix(rotation: Rotation) -> Tensor:
    """R [D, D] of a rotation, float64 on the CPU."""
    return rotation.apply(torch.eye(rotation.width, dtype=torch.float64))


def quarot(model: PreTrainedModel, *, seed: int = 0, values: bool = True) -> RotationReport:
    """Fuse QuaRot's rotations into `model`, in place, its logits unchanged.

    values: also turn each head's values, where head width and architecture allow; the report says what was done. Raises
    ModelError, with nothing changed, for models whose residual stream cannot be turned (see surgery/rotate.py).
    """
    embedding: Any = model.get_input_embeddings()
    return turned(model, random_rotation(embedding.embedding_dim, seed), values)


def turned(model: PreTrainedModel, rotation: Rotation, values: bool) -> RotationReport:
    """`rotate` with a Hadamard transform of each head's values, if they are wanted and there is one; the report says so."""
    width = head_width(model)
    reachable = constructible(width)
    report = rotate(model, rotation, head_rotation(width) if values and reachable else None)
    if values and not reachable:
        report = replace(report, values=f"left alone: there is no Hadamard matrix for heads of {width}")
    return report
