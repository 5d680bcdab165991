"""What a GGUF file says of its model: a config of transformers, and which tensor has which name and shape there.

Everything that the metadata says of the architecture is read or refused: a key that is not known here would be a part of the
model that is silently left out. The tensors are compared with what the header asks for before anything is allocated.

Letters: D width, F hidden width, H heads, J key-value heads, E head size, L layers, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trilobit.errors import ModelError
from trilobit.infer.gguf_file import GgufFile

BLOCK_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SUB_NORMS = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}
LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
ACTIVATIONS = ("silu", "relu2")  # of bitnet
GEMMA_27B_LAYERS = 62  # the one whose attention is scaled by D/H, not by E
GEMMA_LOCAL_THETA = 10_000.0


@dataclass(frozen=True)
class Architecture:
    """config: of transformers. norms: of a layer. free_head: E need not be D/H. scaled: its graph reads `.scale` tensors."""

    config: str
    norms: dict[str, str]
    free_head: bool
    scaled: bool


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", BLOCK_NORMS, True, True),
    "qwen2": Architecture("Qwen2Config", BLOCK_NORMS, False, False),
    "qwen3": Architecture("Qwen3Config", BLOCK_NORMS | HEAD_NORMS, True, True),
    "gemma3": Architecture("Gemma3TextConfig", GEMMA_NORMS | HEAD_NORMS, True, False),
    "bitnet": Architecture("BitNetConfig", BLOCK_NORMS | SUB_NORMS, False, True),
}
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "vocab_size",
}  # fmt: skip
READ_BY = {
    "gemma3": {"attention.sliding_window", "rope.freq_base_swa"}, "bitnet": {"hidden_activation"}
}  # fmt: skip


class GgufHeader:
    """What the metadata says of the model."""

    def __init__(self, file: GgufFile):
        self.file = file
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise ModelError(f"its architecture is {str(name)[:40]!r}; {', '.join(ARCHITECTURES)} are read.")
        if file.metadata.get("split.count", 0) not in (0, 1):
            raise ModelError("it is one of several parts: join them (llama-gguf-split --merge).")
        self.name, self.kind = name, ARCHITECTURES[name]
        known = READ | READ_BY.get(name, set())
        said = [key.removeprefix(f"{name}.") for key in file.metadata if key.startswith(f"{name}.")]
        if odd := sorted(set(said) - known):
            raise ModelError(f"it says {name}.{odd[0]}, and what that asks of a {name} model is not known here.")
        self.width = self.whole("embedding_length", 1 << 20)
        self.hidden = self.whole("feed_forward_length", 1 << 24)
        self.layers = self.whole("block_count", 1 << 9)
        self.heads = self.whole("attention.head_count", 1 << 16)
        self.kv_heads = self.whole("attention.head_count_kv", 1 << 16, self.heads)
        self.head_size = self.whole("attention.key_length", 1 << 12, self.width // self.heads)
        self.positions = self.whole("context_length", 1 << 28)
        self.eps = self.real("attention.layer_norm_rms_epsilon", None, 1.0)
        embedding = file.tensors.get("token_embd.weight")
        self.vocabulary = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0
        self.tied = "output.weight" not in file.tensors
        self.int8 = name == "bitnet"
        rotary = self.whole("rope.dimension_count", 1 << 12, self.head_size)
        if self.head_size % 2 or rotary != self.head_size or self.whole("attention.value_length", 1 << 12, rotary) != rotary:
            raise ModelError(f"its heads of {self.head_size} turn {rotary} of them: only even ones that turn wholly are read.")
        if self.heads % self.kv_heads or (not self.kind.free_head and self.width != self.heads * self.head_size):
            raise ModelError(
                f"{self.heads} heads of {self.head_size}, {self.kv_heads} of keys, do not fit {self.width} columns."
            )

    def whole(self, key: str, most: int, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.name}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ModelError(f"its {self.name}.{key} is {str(value)[:40]}.")
        return value

    def real(self, key: str, default: float | None, most: float) -> float:
        value = self.file.metadata.get(f"{self.name}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ModelError(f"its {self.name}.{key} is {str(value)[:40]}.")
        return float(value)

    def expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Path in the transformers model, and shape, of each tensor that there must be."""
        d, e = self.width, self.head_size
        queries, keys = self.heads * e, self.kv_heads * e
        shapes = {
            "attn_q": (queries, d), "attn_k": (keys, d), "attn_v": (keys, d), "attn_output": (d, queries),
            "ffn_gate": (self.hidden, d), "ffn_up": (self.hidden, d), "ffn_down": (d, self.hidden),
        }  # fmt: skip
        lengths = {"attn_q_norm": e, "attn_k_norm": e, "ffn_sub_norm": self.hidden, "attn_sub_norm": queries}
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "token_embd.weight": ("model.embed_tokens.weight", (self.vocabulary, d)),
            "output_norm.weight": ("model.norm.weight", (d,)),
        }
        if not self.tied:
            found["output.weight"] = ("lm_head.weight", (self.vocabulary, d))
        for i in range(self.layers):
            for short, path in self.kind.norms.items():
                found[f"blk.{i}.{short}.weight"] = (f"model.layers.{i}.{path}.weight", (lengths.get(short, d),))
            for short, path in LINEARS.items():
                found[f"blk.{i}.{short}.weight"] = (f"model.layers.{i}.{path}.weight", shapes[short])
                if f"blk.0.{short}.bias" in self.file.tensors:
                    found[f"blk.{i}.{short}.bias"] = (f"model.layers.{i}.{path}.bias", shapes[short][:1])
        return found

    def check(self) -> None:
        """Raise ModelError unless the file's tensors are those of a model with this header."""
        tensors = self.file.tensors
        if self.layers * len(LINEARS) > len(tensors):  # before a million layers are listed
            raise ModelError(f"it has {len(tensors)} tensors, too few for {self.layers} layers.")
        expected = self.expected()
        for name, (_, shape) in expected.items():
            if name not in tensors:
                raise ModelError(f"it lacks the tensor {name}.")
            if tensors[name].shape != shape:
                raise ModelError(f"its tensor {name} is {list(tensors[name].shape)}, not {list(shape)}.")
        for name in sorted(tensors.keys() - expected.keys()):
            if name.endswith(".scale") and name.removesuffix("scale") + "weight" in expected:
                if not self.kind.scaled or tensors[name].shape != (1,):
                    raise ModelError(f"its {name} is none that {self.name} graphs use.")
            elif name != "rope_freqs.weight" or self.name != "llama" or tensors[name].shape != (self.head_size // 2,):
                raise ModelError(f"it has a tensor {name[:80]!r}, which a {self.name} model here does not have.")

    def config(self) -> PretrainedConfig:
        theta = self.real("rope.freq_base", 10_000.0, 1e12)
        settings: dict[str, Any] = {
            "vocab_size": self.vocabulary, "hidden_size": self.width, "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.positions, "rms_norm_eps": self.eps, "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_theta": theta, **self.rope_scaling(theta)}, "pad_token_id": None,
        }  # fmt: skip
        if self.kind.free_head:
            settings["head_dim"] = self.head_size
        if self.name == "bitnet":
            act = self.file.metadata.get(
                "bitnet.hidden_activation", "silu"
            )  # llama.cpp's own default, and for long its only one
            if act not in ACTIVATIONS:
                raise ModelError(f"its gate is {str(act)[:40]!r}; {', '.join(ACTIVATIONS)} are read.")
            settings["hidden_act"] = act
        if self.name != "qwen2":  # which has them on q, k and v always
            settings["attention_bias"] = "blk.0.attn_q.bias" in self.file.tensors
        if self.name == "llama":
            settings["mlp_bias"] = "blk.0.ffn_up.bias" in self.file.tensors
        if self.name == "gemma3":
            local = self.real("rope.freq_base_swa", GEMMA_LOCAL_THETA, 1e12)
            settings |= {
                "sliding_window": self.whole("attention.sliding_window", 1 << 28),
                "query_pre_attn_scalar": self.head_size if self.layers != GEMMA_27B_LAYERS else self.width // self.heads,
                "rope_parameters": {
                    "full_attention": settings["rope_parameters"],
                    "sliding_attention": {"rope_type": "default", "rope_theta": local},
                },
            }
        return getattr(transformers, self.kind.config)(**settings)

    def rope_scaling(self, theta: float) -> dict[str, Any]:
        """How positions are stretched, as transformers says it."""
        kind = self.file.metadata.get(f"{self.name}.rope.scaling.type", "none")
        if "rope_freqs.weight" in self.file.tensors:
            return self.llama3_scaling(theta)
        if kind == "none":
            return {"rope_type": "default"}
        factor = self.real("rope.scaling.factor", None, 1e6)
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self.whole("rope.scaling.original_context_length", 1 << 28)
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        raise ModelError(f"its positions are stretched by {str(kind)[:40]!r}; none, linear and yarn are read.")

    def llama3_scaling(self, theta: float) -> dict[str, Any]:
        """Llama 3's, which files keep as what it divides each frequency by: recognised only if it gives just that."""
        divisors = self.file.dense("rope_freqs.weight")
        rope: dict[str, Any] = {
            "rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        if not bool(torch.isfinite(divisors).all()) or not 1 <= rope["factor"] <= 1e6:
            raise ModelError("its rope_freqs are no divisors of frequencies.")
        if bool(divisors.max() - divisors.min() <= 1e-6 * rope["factor"]):  # quotients of rounded frequencies
            return {"rope_type": "linear", "factor": float(divisors.median())}
        config = transformers.LlamaConfig(
            head_dim=self.head_size, max_position_embeddings=self.positions, rope_parameters={"rope_theta": theta, **rope}
        )
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double()
        plain = theta ** -(torch.arange(0, self.head_size, 2).double() / self.head_size)
        if not torch.allclose(plain / divisors.double(), frequencies, rtol=1e-4):
            raise ModelError("its rope_freqs are not those of Llama 3, and no others are read.")
        return rope
