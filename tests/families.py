"""Small random models of every family that is supported, and of kinds that are refused.

One-dimensional parameters (biases, norm gains) are moved away from their zeros and ones, and weights are large enough
for attention and MLPs to matter: a model whose biases are zero cannot notice a lost bias.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

VOCABULARY = 97
LAYERS = 3
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
}
SCALED_EMBEDDING = {"gemma3_text"}


def build(family: str, *, tied: bool = False, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of `family` in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {**COMMON, **FAMILIES.get(family, {}), "tie_word_embeddings": tied, **overrides}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        return perturb(model)


def perturb(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _quantized_checkpoint() -> PreTrainedModel:
    model = build("llama")
    model.config.quantization_config = {"quant_method": "bitnet"}
    return model


_BERT = {**COMMON, "num_hidden_layers": 2}
REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mixtral": (lambda: build("mixtral", num_local_experts=2), "MixtralTopKRouter that owns weight"),
    "qwen2_moe": (
        lambda: build("qwen2_moe", num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        "Qwen2MoeTopKRouter that owns weight",
    ),
    "llama4": (lambda: build("llama4_text", head_dim=8), "Llama4TextExperts that owns gate_up_proj"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)),
        "Conv1D that owns weight",
    ),
    "falcon": (
        lambda: FalconForCausalLM(
            FalconConfig(
                vocab_size=97,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "FalconLinear that owns weight",
    ),
    "bert": (lambda: BertForMaskedLM(BertConfig(**_BERT)), "not causal"),
    "bert-lm": (lambda: BertLMHeadModel(BertConfig(**_BERT)), "not causal"),
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
        "not a decoder-only text model",
    ),
    "quantized": (_quantized_checkpoint, "is a quantised checkpoint"),
    "no-head": (lambda: build("llama").model, "has no linear language-model head"),
}
