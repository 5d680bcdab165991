"""What a plan has to know of a model, counted without its weights or any memory: parameters, Muon's matrices, and what autograd
keeps of a layer (on fake tensors). The letters are those of plan.py.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from trilobit.infer.quiet import quiet_transformers
from trilobit.nn.ternary import TernaryLinear
from trilobit.surgery.roles import decoder_layers
from trilobit.train.architecture import LLAMAS, read_architecture
from trilobit.train.muon import hidden_matrices

FULL_SIZE: dict[str, dict[str, Any]] = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128_256},
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                  "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
VOCABULARY = 49_152  # of a Llama of ours, whose own is its tokenizer's
PROBED_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """What is counted of a model. Parameters: all, of the decoder layers, of Muon's matrices, as matrices [R, C]."""

    parameters: int
    inside: int
    matrices: tuple[tuple[int, int], ...]
    layers: int
    width: int
    vocabulary: int
    embedding: int
    layer_bytes: int
    """What autograd keeps of one layer for one token, computing in bf16."""
    layer_fixed: int
    """What it keeps of one layer whatever the tokens: ternary codes, a byte a weight."""

    @property
    def muons(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)


def read_shape(model: str, sequence_length: int) -> Shape:
    """Count a model by building it without memory. model: as of `pretrain`, or llama-8b, llama-70b. Raises ModelError."""
    config = shape_config(model, sequence_length)
    with torch.device("meta"), quiet_transformers():
        built = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    layers = decoder_layers(built)
    embedding = built.get_input_embeddings().weight.numel()
    fixed, by_token = saved_by_a_layer(config)
    return Shape(
        parameters=sum(p.numel() for p in built.parameters()),
        inside=sum(p.numel() for _, layer in layers for p in layer.parameters()),
        matrices=tuple((p.shape[-2], p.shape[-1]) for p in hidden_matrices(built) for _ in range(p.shape[:-2].numel())),
        layers=len(layers), width=text.hidden_size, vocabulary=text.vocab_size, embedding=embedding,
        layer_bytes=by_token, layer_fixed=fixed,
    )  # fmt: skip


def shape_config(model: str, sequence_length: int) -> PretrainedConfig:
    if model in FULL_SIZE or model in LLAMAS:
        sizes = {"vocab_size": VOCABULARY, **(FULL_SIZE.get(model) or LLAMAS[model])}
        return LlamaConfig(**sizes, max_position_embeddings=sequence_length, tie_word_embeddings=False)
    return read_architecture(model, sequence_length, (*LLAMAS, *FULL_SIZE))


def saved_by_a_layer(config: PretrainedConfig, fake: bool = True) -> tuple[int, int]:
    """Bytes that autograd keeps of one ternary layer (λ = 1, a norm everywhere), computing in bf16: at all, and for each token.

    Differences of two layers and one at three lengths, on fake tensors: without memory or arithmetic. What grows as the square
    of the length is left out: a mask, which transformers makes only where it cannot look at the values.
    """
    n = PROBED_TOKENS
    one, two, three = (saved_bytes(config, 2, k * n, fake) - saved_bytes(config, 1, k * n, fake) for k in (1, 2, 3))
    square = (three - 2 * two + one) // 2
    by_token = (two - one - 3 * square) // n
    return one - by_token * n - square, by_token


def saved_bytes(config: PretrainedConfig, layers: int, tokens: int, fake: bool = True) -> int:
    """What autograd keeps of a forward over `tokens` tokens, each piece of memory once, parameters left out. fake: false to
    compute it, for a check."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = layers, 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for _, layer in decoder_layers(model):
            for path, module in list(layer.named_modules()):
                if type(module) is nn.Linear:
                    layer.set_submodule(path, TernaryLinear.from_linear(module))
    with FakeTensorMode() if fake else nullcontext():
        return _count_saved(model, tokens)


def _count_saved(model: nn.Module, tokens: int) -> int:
    """`saved_bytes` of a model on meta, whose tensors become those of the mode that is on."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output: Any = model.base_model(  # pyright: ignore[reportCallIssue]
            input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False
        )
    assert output is not None
    return sum(storage.nbytes() for storage in kept.values())
