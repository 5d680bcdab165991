"""A frozen ternary model as the engine's tensors: which models, and what becomes of each of their parts.

    compile(model, form)   a transformers model with frozen ternary modules  ──▶  Graph: header and tensors by name

Native are Llama-like decoders of the classes in NATIVE (RMSNorm, grouped-query attention with rotary positions, q/k norms,
biases, sliding windows, layers without positions, a gated MLP with silu or relu²), ternary with int8 or full-precision
activations, norms anywhere `tune` puts them. What is not is refused with the reason, and transformers runs it.

Embeddings that are not ternary are bf16; the head is int8 with an fp16 scale for each row and HEAD_GROUP columns, and reads
its input in 16 bits (two int8 codes), so that only its own rounding is left. Weights-only models are given int8 activations, a
scale for each token and group of weights (128 columns where the model has no groups): docs/formats.md says what that costs.

Letters: O rows, K columns, G groups.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedModel

from trilobit import quant
from trilobit.errors import ModelError
from trilobit.infer.graph import DTYPES, Graph, Header, check
from trilobit.kernels import native
from trilobit.kernels.engine import Gate
from trilobit.kernels.frozen_linear import layout
from trilobit.kernels.native import Format
from trilobit.nn.packed import PackedEmbedding, PackedLinear

NATIVE = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "BitNet")
MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
GATES: dict[str, Gate] = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
WEIGHTS_ONLY_GROUP = 128
MOST_HEAD_SIZE = 256  # floats.h
HEAD_GROUP = 32
LEAST_HALF = 2.0**-24  # above 0 in fp16


class NotNative(ModelError):
    """The engine has no graph for this model. Says why; transformers runs it."""


def why_not_native(model: nn.Module) -> str | None:
    """Why the engine has no graph for a model of this class, or None."""
    import transformers

    if not any(type(model) is getattr(transformers, f"{name}ForCausalLM", None) for name in NATIVE):
        return f"the engine has no graph for {type(model).__name__} (it has {', '.join(NATIVE)})"
    config: Any = model.config
    if config.hidden_act not in GATES:
        return f"the engine has no {config.hidden_act} gate (it has {', '.join(GATES)})"
    size = model.model.layers[0].self_attn.head_dim  # pyright: ignore
    if size > MOST_HEAD_SIZE or size % 2:
        return f"the engine has no heads of size {size} (even ones up to {MOST_HEAD_SIZE})"
    kind: str = model.model.rotary_emb.rope_type  # pyright: ignore
    if "dynamic" in kind or kind == "longrope":
        return f"the engine has no {kind} positions, whose angles depend on the length of the text"
    return None


@torch.no_grad()
def compile(model: PreTrainedModel, form: Format | None = None, head_group: int = HEAD_GROUP) -> Graph:
    """The engine's tensors of a model whose projections are frozen ternary modules (PackedLinear). form: `two-bit` or
    `base-3`, by default what is fastest here. Raises NotNative."""
    if reason := why_not_native(model):
        raise NotNative(f"{reason}.")
    config: Any = model.config
    decoder: Any = model.model
    first = decoder.layers[0].self_attn.q_proj
    if not isinstance(first, PackedLinear):
        raise NotNative("its projections are not ternary: the engine runs ternary models only.")
    int8 = first.int8_activations
    group = quant.group_size(first.granularity) or (0 if int8 else WEIGHTS_ONLY_GROUP)
    tensors: dict[str, Tensor] = {"norm": _gain(decoder.norm, config.hidden_size, config.rms_norm_eps)}
    tensors["rope.frequencies"] = decoder.rotary_emb.inv_freq.float().cpu().contiguous()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (embedding, head):  # by exact type: a projected embedding is an nn.Embedding too
        if type(module) not in (nn.Embedding, nn.Linear, PackedEmbedding, PackedLinear):
            raise NotNative(f"the engine has no {type(module).__name__}: fold the model first.")
    header = Header(
        width=config.hidden_size, hidden=config.intermediate_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, head_size=decoder.layers[0].self_attn.head_dim, layers=len(decoder.layers),
        vocabulary=embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else embedding.num_embeddings,  # pyright: ignore
        positions=config.max_position_embeddings, eps=config.rms_norm_eps,
        attention_scale=decoder.layers[0].self_attn.scaling, rotary_scale=float(decoder.rotary_emb.attention_scaling),
        gate=GATES[config.hidden_act], windows=[_window(i, config) for i in range(len(decoder.layers))],
        rotary=[bool(getattr(layer.self_attn, "use_rope", True)) for layer in decoder.layers],
        layout=form or layout(f"group-{group}" if group else "tensor"), group=group,  # pyright: ignore[reportArgumentType]
        activations="token" if int8 else "group",
        norm_eps=first.rms_norm.eps if first.rms_norm is not None else _inner_eps(decoder.layers[0], config),
        ternary_head=isinstance(head, PackedLinear), head_group=head_group,
        ternary_embedding=isinstance(embedding, PackedEmbedding),
    )  # fmt: skip
    if isinstance(embedding, PackedEmbedding):
        tensors |= _packed("embedding", embedding, header)
    else:
        tensors["embedding"] = embedding.weight.to(torch.bfloat16).contiguous()  # pyright: ignore
    if isinstance(head, PackedLinear):
        tensors |= _linear("head", head, header)
        if all(
            torch.equal(tensors[f"head.{part}"], tensors.get(f"embedding.{part}", tensors["norm"]))
            for part in ("codes", "scales")
        ):
            del tensors["head.codes"], tensors["head.scales"]  # tied
    else:
        tensors |= int8_matrix("head", head.weight.float(), head_group)  # pyright: ignore
        if head.bias is not None:  # pyright: ignore
            raise NotNative("the engine has no head with a bias.")
    for i, layer in enumerate(decoder.layers):
        at = f"layers.{i}"
        tensors[f"{at}.attention_norm"] = _gain(layer.input_layernorm, header.width, header.eps)
        tensors[f"{at}.mlp_norm"] = _gain(layer.post_attention_layernorm, header.width, header.eps)
        for name in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, name):
                tensors[f"{at}.{name}"] = _gain(getattr(layer.self_attn, name), header.head_size, header.eps)
        for name, path in MODULES.items():
            tensors |= _linear(f"{at}.{name}", layer.get_submodule(path), header)
        sub_norms = {"o": getattr(layer.self_attn, "attn_sub_norm", None), "down": getattr(layer.mlp, "ffn_sub_norm", None)}
        for name, norm in sub_norms.items():
            if norm is None:
                continue
            if f"{at}.{name}.gain" in tensors:
                raise NotNative(f"{MODULES[name]} reads two norms, one after the other.")
            tensors[f"{at}.{name}.gain"] = _gain(norm, header.matrices()[name][1], header.norm_eps)
    graph = Graph(header, {name: tensor.cpu() for name, tensor in tensors.items()})
    names = {dtype: name for name, dtype in DTYPES.items()}
    try:
        check(header, {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in graph.tensors.items()})
    except ModelError as error:
        raise NotNative(f"the engine has no graph for this model: {error}") from error
    return graph


def _inner_eps(layer: Any, config: Any) -> float:
    """ε of the norms in front of o and down, which may have one where q has none."""
    norm = getattr(layer.self_attn.o_proj, "rms_norm", None)
    return config.rms_norm_eps if norm is None else norm.eps


def _window(index: int, config: Any) -> int:
    """Latest positions that a layer attends to, 0 for all: what transformers' masks are made from, not what modules hold."""
    kinds = getattr(config, "layer_types", None)
    if isinstance(config, MistralConfig) or (kinds and kinds[index] == "sliding_attention"):
        return config.sliding_window or 0
    return 0


def _gain(norm: nn.Module, width: int, eps: float) -> Tensor:
    """The gain of a block norm as [width] fp32."""
    own = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if own != eps:
        raise NotNative(f"its norms have different epsilons ({own}, {eps}).")
    weight: Any = norm.weight
    return weight.float().expand(width).contiguous()


def _packed(name: str, module: PackedLinear | PackedEmbedding, header: Header) -> dict[str, Tensor]:
    """Codes and scales of a frozen module; a scale per row or matrix is repeated where the header has groups."""
    codes, scale = module.codes, module.scale.float()
    granularity = f"group-{header.group}" if header.group else "tensor"
    packed = native.pack(codes.contiguous(), header.layout, granularity).data  # pyright: ignore[reportArgumentType]
    if header.group:
        groups = -(-codes.shape[1] // header.group)
        scale = scale.expand(codes.shape[0], groups).T if scale.shape[1] == 1 else scale.T
    else:
        scale = scale.flatten()
    return {f"{name}.codes": packed, f"{name}.scales": scale.contiguous()}


def _linear(name: str, module: nn.Module, header: Header) -> dict[str, Tensor]:
    if not isinstance(module, PackedLinear):
        raise NotNative(f"{name} is not ternary, other projections are.")
    own = quant.group_size(module.granularity) or 0
    if module.int8_activations != (header.activations == "token") or own not in (0, header.group):
        raise NotNative(f"{name} is quantised in another way than layers.0.q.")
    tensors = _packed(name, module, header)
    if module.bias is not None:
        tensors[f"{name}.bias"] = module.bias.float().contiguous()
    if module.rms_norm is not None:
        if module.rms_norm.eps != header.norm_eps:
            raise NotNative(f"the norm of {name} has another epsilon than others.")
        tensors[f"{name}.gain"] = module.rms_norm.weight.float().contiguous()
    return tensors


def int8_matrix(name: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    """weight [O, K] as int8 codes with a scale for each row and `group` columns, absmax / 127 rounded to fp16, up where down
    would cut codes off; or for each row (0), fp32. Raises NotNative where fp16 cannot hold a scale."""
    rows, columns = weight.shape
    size = group or columns
    padded = torch.nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)
    absmax = padded.abs().amax(dim=2)  # [O, G]
    scale = (absmax / 127).clamp_min(1e-12)
    if group:
        scale = scale.half().clamp_min(LEAST_HALF)
        scale = (scale.view(torch.int16) + (absmax > 127.5 * scale.float())).to(torch.int16).view(torch.float16)
        if not scale.isfinite().all():
            raise NotNative(f"{name} has weights of {weight.abs().max().item():.3g}: fp16 holds no scale for them.")
    codes = (padded / scale.float()[:, :, None]).round_().clamp_(-127, 127).to(torch.int8).view(rows, -1)[:, :columns]
    packed = native.pack(codes.contiguous(), "int8", f"group-{group}" if group else "tensor").data  # pyright: ignore
    return {f"{name}.codes": packed, f"{name}.scales": (scale.T if group else scale.flatten()).contiguous()}
