"""Small GGUF files of the architectures that are read, written with the `gguf` package's writer and codecs, and the
transformers model that each one is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import build
from infer.checkpoints import BYTES, byte_tokenizer

MERGES = ("a b",)
VOCABULARY = BYTES + len(MERGES)
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.06, "vocab_size": VOCABULARY,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
    "bitnet": ("bitnet", {"tie_word_embeddings": True, "hidden_act": "silu"}),
}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm", "input_layernorm": "attn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def q2_0(weight: np.ndarray, group: int) -> np.ndarray:
    """Rows of fp16 scale and 2-bit symbols, code + 1, the first of a byte in its lowest bits."""
    rows = weight.reshape(-1, group).astype(np.float32)
    scale = np.abs(rows).max(axis=1, keepdims=True).astype(np.float16)
    symbols = (np.sign(rows) + 1).astype(np.uint8).reshape(len(rows), -1, 4)
    packed = symbols[..., 0] + 4 * symbols[..., 1] + 16 * symbols[..., 2] + 64 * symbols[..., 3]
    return np.concatenate([scale.view(np.uint8), packed.astype(np.uint8)], axis=1).reshape(len(weight), -1)


PACKERS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "tq1_0": (34, lambda w: gguf.quants.quantize(w, Type.TQ1_0)),
    "tq2_0": (35, lambda w: gguf.quants.quantize(w, Type.TQ2_0)),
    "q2_0": (42, lambda w: q2_0(w, 64)),
    "q2_0-128": (42, lambda w: q2_0(w, 128)),
    "q8_0": (8, lambda w: gguf.quants.quantize(w, Type.Q8_0)),
    "f16": (1, lambda w: w.astype(np.float16)),
    "f32": (0, lambda w: w.astype(np.float32)),
}
GROUPS = {"tq1_0": 256, "tq2_0": 256, "q2_0": 64, "q2_0-128": 128}


def ternary(weight: Tensor, group: int, seed: int) -> Tensor:
    """Random codes times the fp16 absmean of each group (0: of the matrix), some groups all zero."""
    generator = torch.Generator().manual_seed(seed)
    columns = group or weight.shape[1]
    parts = weight.reshape(weight.shape[0], -1, columns)
    scale = parts.abs().mean(dim=2, keepdim=True) if group else weight.abs().mean()
    scale = scale.clamp(min=1e-4).half().float()
    codes = (parts / scale).round().clamp(-1, 1)
    if group:
        codes = codes * (torch.rand(*codes.shape[:2], 1, generator=generator) > 0.05)
    return (codes * scale).reshape(weight.shape)


@dataclass(frozen=True)
class Written:
    """path; model: what transformers makes of it with dense weights; kind: of the projections."""

    path: Path
    model: PreTrainedModel


@torch.no_grad()
def write_gguf(
    path: Path, architecture: str, kind: str, *, granule: int | None = None, ends: str = "f32",
    tokenizer: PreTrainedTokenizerFast | None = None, change: Callable[[Any], Any] | None = None, **settings: Any,
) -> Written:  # fmt: skip
    """A random model as a file. kind: of the projections, in groups of `granule` columns (default: what kind has; 0: one
    scale for each matrix); ends: of embedding and head, ternary ones of groups, too; change: further things to write."""
    family, own = FAMILIES[architecture]
    options = {**SIZES, **own, **settings}
    tied = options.pop("tie_word_embeddings", False)
    model = build(family, tied=tied, **options)
    granule = GROUPS.get(kind, 0) if granule is None else granule
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer, model, architecture)
    add_tokenizer(writer, tokenizer or byte_tokenizer(merges=MERGES))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        module = name.rpartition(".")[0]
        if parameter.ndim == 2:
            end = module in ENDS
            stored = ends if end else kind
            if stored in GROUPS:
                parameter.copy_(ternary(parameter, GROUPS[ends] if end else granule, index))
            elif stored == "q8_0":
                number = Type(PACKERS[stored][0])
                rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), number), number)
                parameter.copy_(torch.from_numpy(rounded))
            elif stored == "f16":
                parameter.copy_(parameter.half().float())
            _add(writer, gguf_name(name, architecture), _permuted(parameter, name, model, architecture), stored)
        else:
            value = parameter + 1 if architecture == "gemma3" else parameter
            _add(writer, gguf_name(name, architecture), _permuted(value, name, model, architecture), "f32")
    if change is not None:
        change(writer)
    _finish(writer)
    return Written(path, model)


def gguf_name(name: str, architecture: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    _, _, layer, path = module.split(".", 3)
    gemma = architecture == "gemma3"
    norms = {
        "post_attention_layernorm": "post_attention_norm" if gemma else "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }  # fmt: skip
    return f"blk.{layer}.{(NAMES | norms)[path]}.{kind}"


def _permuted(value: Tensor, name: str, model: PreTrainedModel, architecture: str) -> np.ndarray:
    """llama's queries and keys in the order of interleaved rotary positions."""
    config: Any = model.config
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
    return value.detach().numpy()


def _add(writer: Any, name: str, value: np.ndarray, kind: str) -> None:
    number, pack = PACKERS[kind]
    data = np.ascontiguousarray(pack(value))
    if kind in ("f32", "f16"):
        writer.add_tensor(name, data)
        return
    block, size = (int(kind.split("-")[1]) if "-" in kind else 64, 0) if number == 42 else gguf.GGML_QUANT_SIZES[Type(number)]
    rows = value.shape[1] // block
    assert data.shape == (value.shape[0], rows * (size or 2 + block // 4)), (data.shape, value.shape)
    # The writer takes a shape in bytes and works out the elements from the type's sizes, which 42 does not have there.
    writer.add_tensor_info(name, value.shape, np.dtype(np.float32), data.nbytes, number)
    writer.tensors[-1][name].tensor = data


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, model: PreTrainedModel, architecture: str) -> None:
    config: Any = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if size := getattr(config, "head_dim", None):
        writer.add_key_length(size)
        writer.add_value_length(size)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture == "bitnet" and config.hidden_act != "silu":
        writer.add_string("bitnet.hidden_activation", config.hidden_act)


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """A byte-level one, cut as GPT-2 cuts."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
