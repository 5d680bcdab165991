"""What a model loses at 4-bit weights, activations and KV cache: round to nearest, fake quantisation, nothing calibrated.

    weights       symmetric per output channel; the clip of 1.0, 0.99, …, 0.81 that has the least Σ|error|^2.4
    activations   asymmetric per token, at the input of every decoder linear
    keys, values  asymmetric per token and head, after RoPE; queries and keys are Hadamard-rotated first, as everywhere else
    ffn_hadamard  the input of each MLP's last linear rotated on the fly, its weight counter-rotated

The settings are those of outlier-safe pre-training (arXiv 2506.19697). Embeddings and head stay as they are. Where a width is
no power of two it is rotated in blocks of the largest power that divides it. The complete protocols are another matter;
this is what the ablation's table needs (experiments/osp_ablation.py).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trilobit.surgery.roles import find_roles

NAME = "trilobit_fake_kv"
GRID, SHRINK, NORM = 20, 0.8, 2.4


def fake_weight(weight: Tensor, bits: int) -> Tensor:
    """[O, K] on a symmetric grid of 2^bits − 1 levels per row, each row's clip searched."""
    levels = 2 ** (bits - 1) - 1
    top = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    best, least = weight, torch.full_like(top, torch.inf)
    for step in range(GRID):
        scale = top * (1 - step / GRID * (1 - SHRINK)) / levels
        rounded = torch.clamp((weight / scale).round(), -levels, levels) * scale
        error = (rounded - weight).abs().pow(NORM).sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best


def fake_asymmetric(x: Tensor, bits: int) -> Tensor:
    """[..., K] on an asymmetric grid of 2^bits levels over the last dimension, zero on the grid."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    zero = (-low / scale).round()
    return (torch.clamp((x / scale).round() + zero, 0, 2**bits - 1) - zero) * scale


def hadamard(width: int) -> Tensor:
    """[B, B], orthogonal: B is the largest power of two that divides `width`."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while width % (2 * len(matrix)) == 0:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / len(matrix) ** 0.5


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """The last dimension of x, block by block, times `rotation`."""
    return (x.reshape(*x.shape[:-1], -1, len(rotation)) @ rotation.to(x)).reshape(x.shape)


def quantized(model: PreTrainedModel, weights: int, activations: int, cache: int, ffn_hadamard: bool) -> PreTrainedModel:
    """A copy of a stock `model` that computes as if quantised; 16 bits mean none."""
    model = copy.deepcopy(model).eval()
    for site in find_roles(model).sites:
        linear = model.get_submodule(site.path)
        assert isinstance(linear, nn.Linear), type(linear)
        rotation = hadamard(linear.in_features) if ffn_hadamard and site.role == "mlp-output" else None
        with torch.no_grad():
            weight = linear.weight if rotation is None else rotate(linear.weight, rotation)
            linear.weight.copy_(fake_weight(weight, weights) if weights < 16 else weight)

        def before(module: nn.Module, inputs: Any, rotation: Tensor | None = rotation) -> Any:
            x = inputs[0] if rotation is None else rotate(inputs[0], rotation)
            return (fake_asymmetric(x, activations) if activations < 16 else x, *inputs[1:])

        linear.register_forward_pre_hook(before)
    if cache < 16:
        model.set_attn_implementation(NAME)
        for module in model.modules():
            module._fake_cache_bits = cache  # pyright: ignore[reportArgumentType]
    return model


def _fake_cache(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
    bits: Any = module._fake_cache_bits
    rotation = hadamard(key.shape[-1])
    query, key = rotate(query, rotation), rotate(key, rotation)
    key, value = fake_asymmetric(key, bits), fake_asymmetric(value, bits)
    return sdpa_attention_forward(module, query, key, value, *arguments, **options)


AttentionInterface.register(NAME, _fake_cache)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
