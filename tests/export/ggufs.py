"""Small models with a real tokenizer, as directories that the GGUF writer reads, for the tests of exporting."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from families import build
from trilobit import demo
from trilobit.export.hf import write_latent
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded
from trilobit.infer.stored import freeze
from trilobit.surgery.ternary import TernarySpec, ternarize

VOCABULARY = 4096
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GEMMA = {"num_hidden_layers": 6, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}


def windows(count: int = 1, length: int = 33) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def stored(
    folder: Path, family: str = "llama", *, settings: dict[str, Any] | None = None, constant_gains: bool = False, **spec: Any
) -> Path:
    """A trained-looking ternary model (without a spec: an ordinary one) as trainable latents, with the demo's tokenizer."""
    settings = {**SIZES, **(GEMMA if family.startswith("gemma") else {}), **(settings or {})}
    model = build(family, **settings)
    if constant_gains:
        _make_constant(model)
    plan = ternarize(model, TernarySpec(**spec)).plan if spec else None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".rms_norm.weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    write_latent(model, plan, AutoTokenizer.from_pretrained(demo.MODEL), folder)
    return folder


def _make_constant(model: PreTrainedModel) -> None:
    """Block gains as single-scale norms leave them, negative ones among them."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("layernorm.weight"):
                parameter.fill_((-1) ** index * (0.5 + 0.1 * index))


def frozen(folder: Path) -> Loaded:
    loaded = load(folder)
    freeze(loaded.model)
    return loaded
