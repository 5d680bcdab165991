"""A frozen ternary model as the engine's tensors: which models, under which names, in which shapes.

    compile(model, plan)   a transformers model with frozen ternary modules  ──▶  Graph: header and tensors by name
    Graph.decoder()        ──▶ what kernels/engine.py runs

Native are Llama-like decoders of the classes in NATIVE (RMSNorm, grouped-query attention with rotary positions, q/k norms,
biases, sliding windows, layers without positions, a gated MLP with silu or relu²), ternary with int8 or full-precision
activations, norms anywhere `tune` puts them. What is not is refused with the reason, and transformers runs it.

Embeddings that are not ternary are bf16; the head is int8 with a scale for each row and GROUP columns, and reads its input in
16 bits (two int8 codes), so that only its own rounding is left. Weights-only models are given int8 activations, a scale for
each token and group of weights (128 columns where the model has no groups): docs/formats.md says what that costs.

docs/formats.md lists the tensors. Letters: V vocabulary, D width, F hidden width, O rows, K columns, G groups.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin

import torch
from torch import Tensor, nn
from transformers import MistralConfig, PreTrainedModel

from trilobit import quant
from trilobit.errors import ModelError
from trilobit.kernels import native
from trilobit.kernels.engine import Activations, Decoder, Gate, Layer, Projection
from trilobit.kernels.frozen_linear import layout
from trilobit.kernels.native import Format, PackedMatrix
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
LEAST_TENSORS = 2 + 2 * len(MODULES)  # of a layer: norms, and codes and scales of each matrix
DTYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}


class NotNative(ModelError):
    """The engine has no graph for this model. Says why; transformers runs it."""


@dataclass(frozen=True)
class Header:
    """What the tensors do not say. group: columns of a ternary matrix that share a scale, 0 for none; head_group likewise."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int
    positions: int
    eps: float
    attention_scale: float
    rotary_scale: float
    gate: Gate
    windows: list[int]
    rotary: list[bool]
    layout: Format
    group: int
    activations: Activations
    norm_eps: float
    ternary_head: bool
    head_group: int
    ternary_embedding: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Header":
        """Raises ModelError unless every field is there, of its type and in its range."""
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(cls)}:
            raise ModelError("its header does not list the fields of a native model.")
        for field in fields(cls):
            if not _is_a(value[field.name], field.type):
                raise ModelError(f"its header says {field.name} = {str(value[field.name])[:80]!r}.")
        header = cls(**value)
        sizes = (header.width, header.hidden, header.heads, header.kv_heads, header.head_size, header.layers)
        right = all(0 < size < 1 << 20 for size in sizes)
        right = right and all(0 < size < 1 << 24 for size in (header.vocabulary, header.positions))
        right = right and len(header.windows) == len(header.rotary) == header.layers and min(header.windows) >= 0
        right = right and 0 <= header.group < 1 << 20 and 0 <= header.head_group < 1 << 20 and max(header.windows) < 1 << 31
        if not right or header.layout == "int8" or header.activations == "int16":
            raise ModelError("its header has a size that no model has.")
        return header

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[O, K] of each projection of a layer."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes = {"q": (queries, self.width), "k": (keys, self.width), "v": (keys, self.width), "o": (self.width, queries)}
        return shapes | {"gate": (self.hidden, self.width), "up": (self.hidden, self.width), "down": (self.width, self.hidden)}


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    return value in get_args(kind) if get_args(kind) else isinstance(value, kind)


@dataclass(frozen=True)
class Expected:
    """A tensor's dtype and the shapes it may have."""

    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


def _vector(*lengths: int, optional: bool = False) -> Expected:
    return Expected("F32", tuple((n,) for n in lengths), optional)


def _matrix(name: str, form: Format, rows: int, columns: int, group: int) -> dict[str, Expected]:
    groups = -(-columns // group) if group else 0
    scales = ((groups, rows),) if groups else ((1,), (rows,))
    data = native.packed_bytes(form, rows, columns, group)
    return {f"{name}.codes": Expected("U8", ((data,),)), f"{name}.scales": Expected("F32", scales)}


def expected_tensors(h: Header) -> dict[str, Expected]:
    """Every tensor that a model with this header has or may have, by name."""
    found: dict[str, Expected] = {"norm": _vector(h.width), "rope.frequencies": _vector(h.head_size // 2)}
    if h.ternary_embedding:
        found |= _matrix("embedding", h.layout, h.vocabulary, h.width, h.group)
    else:
        found["embedding"] = Expected("BF16", ((h.vocabulary, h.width),))
    if not (h.ternary_head and h.ternary_embedding):  # a tied pair may be stored once
        found |= _head(h)
    else:
        found |= {name: Expected(e.dtype, e.shapes, True) for name, e in _head(h).items()}
    found |= {"head.gain": _vector(h.width, 1, optional=True), "head.bias": _vector(h.vocabulary, optional=True)}
    for layer in range(h.layers):
        at = f"layers.{layer}"
        found |= {f"{at}.attention_norm": _vector(h.width), f"{at}.mlp_norm": _vector(h.width)}
        found |= {f"{at}.{name}": _vector(h.head_size, optional=True) for name in ("q_norm", "k_norm")}
        for name, (rows, columns) in h.matrices().items():
            found |= _matrix(f"{at}.{name}", h.layout, rows, columns, h.group)
            found[f"{at}.{name}.bias"] = _vector(rows, optional=True)
            found[f"{at}.{name}.gain"] = _vector(columns, 1, optional=True)
    return found


def _head(h: Header) -> dict[str, Expected]:
    if h.ternary_head:
        return _matrix("head", h.layout, h.vocabulary, h.width, h.group)
    return _matrix("head", "int8", h.vocabulary, h.width, h.head_group)


def check(header: Header, found: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise ModelError unless names, dtypes and shapes are those of a model with this header."""
    if len(found) < header.layers * LEAST_TENSORS:  # before a million layers are listed
        raise ModelError(f"it holds {len(found)} tensors, too few for {header.layers} layers.")
    try:
        expected = expected_tensors(header)
    except AssertionError as error:  # of the library
        raise ModelError(f"its header has a matrix that no engine has: {error}") from error
    if ("head.codes" in found) != ("head.scales" in found):
        raise ModelError("it holds half of a head.")
    if odd := sorted(found.keys() - expected.keys()):
        raise ModelError(f"it holds a tensor {odd[0][:80]!r} that a native model does not have.")
    for name, tensor in expected.items():
        if name not in found:
            if not tensor.optional:
                raise ModelError(f"it lacks the tensor {name}.")
        elif found[name][0] != tensor.dtype or found[name][1] not in tensor.shapes:
            raise ModelError(
                f"its tensor {name} is {found[name][0]} {list(found[name][1])}, not {tensor.dtype} {tensor.shapes}."
            )


@dataclass(frozen=True)
class Graph:
    """A native model: header and tensors, by the names of expected_tensors."""

    header: Header
    tensors: dict[str, Tensor]

    def decoder(self) -> Decoder:
        """The engine's description of it, which shares the tensors."""
        h, t = self.header, self.tensors

        def projection(name: str, form: Format, shape: tuple[int, int], group: int, activations: Activations) -> Projection:
            stored = name if f"{name}.codes" in t else "embedding"  # a tied head
            matrix = PackedMatrix(t[f"{stored}.codes"], *shape, group, form)
            bias, gain = t.get(f"{name}.bias"), t.get(f"{name}.gain")
            return Projection(matrix, t[f"{stored}.scales"], bias, gain, h.norm_eps, activations)

        layers = [
            Layer(
                t[f"layers.{i}.attention_norm"], t[f"layers.{i}.mlp_norm"], t.get(f"layers.{i}.q_norm"),
                t.get(f"layers.{i}.k_norm"),
                {n: projection(f"layers.{i}.{n}", h.layout, s, h.group, h.activations) for n, s in h.matrices().items()},
                h.windows[i], h.rotary[i],
            )
            for i in range(h.layers)
        ]  # fmt: skip
        table = (h.vocabulary, h.width)
        embedding = projection("embedding", h.layout, table, h.group, h.activations) if h.ternary_embedding else t["embedding"]
        if not h.ternary_head:
            head = projection("head", "int8", table, h.head_group, "int16")
        else:
            head = projection("head", h.layout, table, h.group, h.activations)
        return Decoder(
            h.width, h.hidden, h.heads, h.kv_heads, h.head_size, h.vocabulary, h.eps, h.attention_scale, h.rotary_scale,
            t["rope.frequencies"], h.gate, layers, t["norm"], embedding, head,
        )  # fmt: skip


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
    names = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
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
    """weight [O, K] as int8 codes with a scale for each row and `group` columns (0: each row), absmax / 127."""
    rows, columns = weight.shape
    size = group or columns
    padded = torch.nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)
    scale = (padded.abs().amax(dim=2) / 127).clamp_min(1e-12)  # [O, G]
    codes = (padded / scale[:, :, None]).round_().clamp_(-127, 127).to(torch.int8).view(rows, -1)[:, :columns]
    packed = native.pack(codes.contiguous(), "int8", f"group-{group}" if group else "tensor").data  # pyright: ignore
    return {f"{name}.codes": packed, f"{name}.scales": (scale.T if group else scale.flatten()).contiguous()}
