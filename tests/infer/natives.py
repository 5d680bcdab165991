"""Frozen ternary models for the engine's tests, and transformers' reading of them with the engine's own rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from families import build
from infer.checkpoints import byte_model, byte_tokenizer
from trilobit import quant
from trilobit.export.hf import write_companions, write_latent
from trilobit.infer import compiler, native_file
from trilobit.infer.compiler import HEAD_GROUP, WEIGHTS_ONLY_GROUP
from trilobit.infer.stored import freeze
from trilobit.nn.packed import PackedLinear
from trilobit.storage import atomic_directory
from trilobit.surgery.ternary import TernarySpec, ternarize

POSITIONS = 128
ROUNDED = "rounded"


def _rounded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    key, value = (t.bfloat16().to(t.dtype) for t in (key, value))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # pyright: ignore


AttentionInterface.register(ROUNDED, _rounded_attention)
AttentionMaskInterface.register(ROUNDED, sdpa_mask)


def frozen(
    family: str = "llama", *, tied: bool = False, settings: dict[str, Any] | None = None, **spec: Any
) -> PreTrainedModel:
    """A random frozen ternary model whose inserted gains look trained: none is one, no two are alike."""
    defaults = {"num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
    model = build(family, tied=tied, **{**defaults, **(settings or {})})
    ternarize(model, TernarySpec(**spec))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".rms_norm.weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return freeze(model).eval()


def latent(folder: Path, family: str = "llama", *, tokenizer: Any = None, **settings: Any) -> Path:
    """A directory as `tune` leaves it, to go on training from: a random ternary model of bytes."""
    model = byte_model(family, **settings)
    plan = ternarize(model).plan
    write_latent(model, plan, byte_tokenizer() if tokenizer is None else tokenizer, folder)
    return folder


def native_directory(folder: Path, *, tokenizer: Any = None, stops: Any = 2, **settings: Any) -> Path:
    """A directory as `export --to native` leaves it, without its check."""
    model = byte_model("llama", **settings)
    plan = ternarize(model).plan
    model.generation_config.eos_token_id = stops
    with atomic_directory(folder) as directory:
        native_file.write(compiler.compile(freeze(model)), directory / native_file.NAME)
        write_companions(directory, model, plan, byte_tokenizer() if tokenizer is None else tokenizer, "native", {})
    return folder


@contextmanager
def as_the_engine_rounds(model: PreTrainedModel) -> Iterator[None]:
    """Until the block ends, the model computes what the engine does: embeddings, keys and values in bf16, an int8 head, and
    where only weights are ternary, int8 activations with a scale for each group."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ROUNDED)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    handles, forwards = [], []
    if isinstance(embedding, nn.Embedding):
        handles.append(embedding.register_forward_hook(lambda module, inputs, output: output.bfloat16().to(output.dtype)))
    if isinstance(head, nn.Linear):
        handles.append(head.register_forward_hook(lambda module, inputs, output: _head(inputs[0], module.weight)))
    for module in model.modules():
        if isinstance(module, PackedLinear) and not module.int8_activations:
            forwards.append(module)
            module._forward = lambda x, module=module: _weights_only(module, x)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
        for module in forwards:
            del module._forward


def _head(x: Tensor, weight: Tensor) -> Tensor:
    scale = weight.unflatten(1, (-1, min(HEAD_GROUP, weight.shape[1]))).abs().amax(-1).clamp_min(1e-10) / 127
    scale = scale.half().float().clamp_min(2.0**-24)
    scale = scale.repeat_interleave(min(HEAD_GROUP, weight.shape[1]), dim=1)
    rounded = (weight / scale).round() * scale
    fine = quant.int8_quantize(x)
    return (fine + quant.int8_quantize(x - fine)) @ rounded.T


def _weights_only(module: PackedLinear, x: Tensor) -> Tensor:
    if module.rms_norm is not None:
        x = quant.rms_norm(x, module.rms_norm.weight, module.rms_norm.eps)
    group = quant.group_size(module.granularity) or WEIGHTS_ONLY_GROUP
    x = torch.cat([quant.int8_quantize(part) for part in x.split(group, dim=-1)], dim=-1)
    weight = quant.ternary_dequantize(module.codes, module.scale, module.granularity)
    return nn.functional.linear(x, weight, module.bias)
