"""A frozen ternary model as the engine's tensors: which models, and what becomes of each of their parts.

    plan(model, parts)     a model's structure  ──▶  Planned: header, and pieces that are made when their turn comes
    compile(model, form)   a transformers model with frozen ternary modules  ──▶  Graph: header and tensors by name

Where the numbers come from is the parts' affair: a model in memory (Whole), or files read module by module
(export/source.py), of which nothing larger than one matrix is in memory.

Native are Llama-like decoders of the classes in NATIVE (RMSNorm, grouped-query attention with rotary positions, q/k norms,
biases, sliding windows, layers without positions, a gated MLP with silu or relu²), ternary with int8 or full-precision
activations, norms anywhere `tune` puts them. What is not is refused with the reason, and transformers runs it.

Embeddings that are not ternary are bf16; the head is int8 with an fp16 scale for each row and HEAD_GROUP columns, and reads
its input in 16 bits (two int8 codes), so that only its own rounding is left. Weights-only models are given int8 activations, a
scale for each token and group of weights (128 columns where the model has no groups): docs/formats.md says what that costs.

Letters: O rows, K columns, G groups.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedModel

from trilobit import quant
from trilobit.errors import ModelError
from trilobit.infer.graph import Expected, Graph, Header, Piece, Planned, Specs, check, expected_tensors
from trilobit.infer.parts import Parts, Whole
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
CHUNK = 1 << 20  # weights of a head that are rounded at a time


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
    return plan(model, Whole(model), form, head_group).graph()


def plan(model: PreTrainedModel, parts: Parts, form: Format | None = None, head_group: int = HEAD_GROUP) -> Planned:
    """Header and pieces of a model, of which only the structure is looked at (its parameters may have no storage).

    form, and what is raised: as compile().
    """
    if reason := why_not_native(model):
        raise NotNative(f"{reason}.")
    config: Any = model.config
    decoder: Any = model.model
    first = parts.kind(f"model.layers.0.{MODULES['q']}")
    if first is None:
        raise NotNative("its projections are not ternary: the engine runs ternary models only.")
    group = quant.group_size(first.granularity) or (0 if first.int8 else WEIGHTS_ONLY_GROUP)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {module: name for name, module in model.named_modules()}
    for module in (embedding, head):  # by exact type: a projected embedding is an nn.Embedding too
        if type(module) not in (nn.Embedding, nn.Linear) and parts.kind(paths[module]) is None:
            raise NotNative(f"the engine has no {type(module).__name__}: fold the model first.")
    rotary = decoder.rotary_emb
    if rotary.inv_freq.is_meta:
        rotary = type(rotary)(config)
    header = Header(
        width=config.hidden_size, hidden=config.intermediate_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, head_size=decoder.layers[0].self_attn.head_dim, layers=len(decoder.layers),
        vocabulary=embedding.num_embeddings,  # pyright: ignore
        positions=config.max_position_embeddings, eps=config.rms_norm_eps,
        attention_scale=decoder.layers[0].self_attn.scaling, rotary_scale=float(rotary.attention_scaling),
        gate=GATES[config.hidden_act], windows=[_window(i, config) for i in range(len(decoder.layers))],
        rotary=[bool(getattr(layer.self_attn, "use_rope", True)) for layer in decoder.layers],
        layout=form or layout(f"group-{group}" if group else "tensor"), group=group,  # pyright: ignore[reportArgumentType]
        activations="token" if first.int8 else "group",
        norm_eps=first.eps if first.eps is not None else _inner_eps(parts, config),
        ternary_head=parts.kind(paths[head]) is not None, head_group=head_group,  # pyright: ignore
        ternary_embedding=parts.kind(paths[embedding]) is not None,
    )  # fmt: skip
    planner = _Planner(model, parts, header)
    planner.add_ends(paths[embedding], paths[head], rotary)  # pyright: ignore
    for index, layer in enumerate(decoder.layers):
        planner.add_layer(f"model.layers.{index}", f"layers.{index}", layer)
    planned = Planned(header, planner.pieces)
    try:
        check(header, planned.specs)
    except ModelError as error:
        raise NotNative(f"the engine has no graph for this model: {error}") from error
    return planned


class _Planner:
    """Pieces as they are added."""

    def __init__(self, model: PreTrainedModel, parts: Parts, header: Header):
        self.model, self.parts, self.header = model, parts, header
        self.pieces: list[Piece] = []

    def add(self, specs: Specs, make: Callable[[], dict[str, Tensor]]) -> None:
        self.pieces.append(Piece(specs, make))

    def add_ends(self, embedding: str, head: str, rotary: Any) -> None:
        h, parts = self.header, self.parts
        self.add_gain("norm", "model.norm", h.width, h.eps)
        frequencies = rotary.inv_freq.float()
        self.add({"rope.frequencies": ("F32", tuple(frequencies.shape))}, lambda: {"rope.frequencies": frequencies})
        if h.ternary_embedding:
            self.add_packed("embedding", embedding)
        else:
            table = {"embedding": ("BF16", (h.vocabulary, h.width))}
            self.add(table, lambda: {"embedding": parts.kept(f"{embedding}.weight").to(torch.bfloat16)})
        if h.ternary_head:
            self.add_linear("head", head, tied=h.ternary_embedding and parts.shares_table())
            return
        module: Any = self.model.get_submodule(head)
        if module.bias is not None:
            raise NotNative("the engine has no head with a bias.")
        owner: Any = self.model.get_submodule(embedding)
        weight = f"{embedding if getattr(owner, 'weight', None) is module.weight else head}.weight"
        specs = self.expected("head.codes", "head.scales")
        self.add(specs, lambda: int8_matrix("head", parts.kept(weight), h.head_group))

    def add_layer(self, path: str, at: str, layer: Any) -> None:
        h = self.header
        self.add_gain(f"{at}.attention_norm", f"{path}.input_layernorm", h.width, h.eps)
        self.add_gain(f"{at}.mlp_norm", f"{path}.post_attention_layernorm", h.width, h.eps)
        for name in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, name):
                self.add_gain(f"{at}.{name}", f"{path}.self_attn.{name}", h.head_size, h.eps)
        for name, module in MODULES.items():
            self.add_linear(f"{at}.{name}", f"{path}.{module}")
        for name, norm in {"o": "self_attn.attn_sub_norm", "down": "mlp.ffn_sub_norm"}.items():
            owner, _, last = norm.partition(".")
            if getattr(getattr(layer, owner), last, None) is None:
                continue
            kind = self.parts.kind(f"{path}.{MODULES[name]}")
            if kind is not None and kind.eps is not None:
                raise NotNative(f"{MODULES[name]} reads two norms, one after the other.")
            self.add_gain(f"{at}.{name}.gain", f"{path}.{norm}", h.matrices()[name][1], h.norm_eps)

    def add_gain(self, name: str, path: str, width: int, eps: float) -> None:
        """The gain of a block norm as [width] fp32."""
        norm: Any = self.model.get_submodule(path)
        own = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if own != eps:
            raise NotNative(f"its norms have different epsilons ({own}, {eps}).")
        self.add({name: ("F32", (width,))}, lambda: {name: self.parts.kept(f"{path}.weight").expand(width)})

    def add_linear(self, name: str, path: str, tied: bool = False) -> None:
        kind, h = self.parts.kind(path), self.header
        if kind is None:
            raise NotNative(f"{name} is not ternary, other projections are.")
        own = quant.group_size(kind.granularity) or 0
        if kind.int8 != (h.activations == "token") or own not in (0, h.group):
            raise NotNative(f"{name} is quantised in another way than layers.0.q.")
        if kind.eps is not None:
            if kind.eps != h.norm_eps:
                raise NotNative(f"the norm of {name} has another epsilon than others.")
            self.add({f"{name}.gain": ("F32", (kind.gain,))}, lambda: {f"{name}.gain": self.parts.gain(path)})
        self.add_packed(name, path, kind.bias, tied)

    def add_packed(self, name: str, path: str, bias: bool = False, tied: bool = False) -> None:
        """Codes and scales of a frozen module; a scale per row or matrix is repeated where the header has groups."""
        h, kind = self.header, self.parts.kind(path)
        assert kind is not None, path
        wanted = ([] if tied else [f"{name}.codes", f"{name}.scales"]) + ([f"{name}.bias"] if bias else [])
        specs = self.expected(*wanted)
        if not h.group and not tied:
            specs[f"{name}.scales"] = ("F32", (1,) if kind.granularity == "tensor" else (self._rows(path),))

        def make() -> dict[str, Tensor]:
            module = self.parts.packed(path)
            found = {} if tied else _packed(name, module, h)
            if bias:
                found[f"{name}.bias"] = module.bias.float()  # pyright: ignore
            return found

        if wanted:
            self.add(specs, make)

    def _rows(self, path: str) -> int:
        module: Any = self.model.get_submodule(path)
        return int(module.num_embeddings if hasattr(module, "num_embeddings") else module.out_features)

    def expected(self, *names: str) -> Specs:
        """What the header asks of tensors, by its first shape where there are several."""
        return {name: (self._asked[name].dtype, self._asked[name].shapes[0]) for name in names}

    @cached_property
    def _asked(self) -> dict[str, Expected]:
        return expected_tensors(self.header)


def _inner_eps(parts: Parts, config: Any) -> float:
    """ε of the norms in front of o and down, which may have one where q has none."""
    kind = parts.kind(f"model.layers.0.{MODULES['o']}")
    return config.rms_norm_eps if kind is None or kind.eps is None else kind.eps


def _window(index: int, config: Any) -> int:
    """Latest positions that a layer attends to, 0 for all: what transformers' masks are made from, not what modules hold."""
    kinds = getattr(config, "layer_types", None)
    if isinstance(config, MistralConfig) or (kinds and kinds[index] == "sliding_attention"):
        return config.sliding_window or 0
    return 0


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


def int8_matrix(name: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    """weight [O, K] as int8 codes with a scale for each row and `group` columns, absmax / 127 rounded to fp16, up where down
    would cut codes off; or for each row (0), fp32. Raises NotNative where fp16 cannot hold a scale."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, -(-columns // group) if group else 1, dtype=torch.float16 if group else torch.float32)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes[part], scale[part] = _int8_rows(name, weight[part], group)
    packed = native.pack(codes, "int8", f"group-{group}" if group else "tensor").data  # pyright: ignore
    return {f"{name}.codes": packed, f"{name}.scales": scale.T if group else scale.flatten()}


def _int8_rows(name: str, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [O, K] and scales [O, G] of int8_matrix, for some rows."""
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
    return codes, scale
