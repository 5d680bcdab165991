"""GGUF files that stock llama.cpp runs: which graph holds a model, under which names, with which numbers.

    graph      holds                                                         of
    bitnet     norms at attention output and MLP output (placement output);  Llama-like, tied head, no biases,
               norms everywhere, if their gains are scalar and block gains    no q/k norms, SiLU
               constant: those in front of q, k, v, gate, up become factors
    llama …    no inserted norms; and models that are not ternary             Llama, Mistral, Qwen2, Qwen3, Gemma 3

Scales are written into the blocks: the optional `.scale` tensors are ignored, silently, by some graphs. A graph has one ε
for all its norms. Where a model has two, the inputs of some are scaled so that the one ε means the other to them
(docs/math.md), which costs nothing: what is scaled are ternary scales.

Written tensor by tensor; letters: V vocabulary, D width, O rows, K columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trilobit import quant
from trilobit.errors import ExportError
from trilobit.export.gguf_blocks import KINDS, encode
from trilobit.export.gguf_vocabulary import add_vocabulary
from trilobit.export.source import Source
from trilobit.formats import Q2_0, TQ1_0, TQ2_0, GgufBlocks
from trilobit.listener import SILENT, Listener

GRAPHS = {"Llama": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma3": "gemma3"}
TERNARY: dict[str, type[GgufBlocks]] = {"tq1_0": TQ1_0, "tq2_0": TQ2_0, "q2_0": Q2_0}
DENSE = ("f16", "f32", "bf16")
LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
SUB_NORMS = {"self_attn.o_proj": "attn_sub_norm", "mlp.down_proj": "ffn_sub_norm"}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # into the residual stream
GEMMA_WINDOW_PATTERN, GEMMA_LOCAL_BASE = 6, 10_000.0  # what the graph takes for granted


@dataclass
class Entry:
    """A tensor of the file: its name, shape, kind (a key of KINDS), and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        block, size, _ = KINDS[self.kind]
        return math.prod(self.shape) // block * size


@dataclass
class Contents:
    """What a file will hold."""

    graph: str
    kind: str
    reason: str
    metadata: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


def write(source: Source, target: Path, kind: str = "auto", head: str = "auto", listener: Listener = SILENT) -> Contents:
    """Write `source` as one GGUF file. kind: of ternary matrices, `auto` or a name in TERNARY or DENSE; of a model that is not
    ternary, one of DENSE. head: of embedding and head. Raises ExportError if no graph or type can hold it, with what can."""
    contents = plan_file(source, kind, head, target.stem)
    writer = gguf.GGUFWriter(target, contents.graph)
    for key, value in contents.metadata.items():
        _add(writer, key, value)
    add_vocabulary(writer, source.tokenizer, vocabulary_size(source))
    for entry in contents.entries:
        block, size, number = KINDS[entry.kind]
        if number not in gguf.GGML_QUANT_SIZES:
            gguf.GGML_QUANT_SIZES[number] = (block, size)  # pyright: ignore[reportArgumentType]
        stored = (*entry.shape[:-1], entry.shape[-1] // block * size)
        writer.add_tensor_info(entry.name, stored, np.dtype(np.uint8), entry.bytes, number)  # pyright: ignore[reportArgumentType]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, entry in enumerate(contents.entries):
        data = entry.read()
        assert data.nbytes == entry.bytes, (entry.name, data.nbytes, entry.bytes)
        writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8))
        listener.progress("writing", index + 1, len(contents.entries), 0.0)
    writer.close()
    return contents


def vocabulary_size(source: Source) -> int:
    return int(source.model.get_input_embeddings().num_embeddings)  # pyright: ignore


def plan_file(source: Source, kind: str, head: str, name: str = "model") -> Contents:
    """Decide graph, types and numbers from the structure alone. Raises ExportError."""
    graph, reason = choose_graph(source)
    contents = Contents(graph, choose_kind(source, kind), reason)
    adjust = _adjustments(source, graph)
    contents.metadata = _metadata(source, graph, adjust, name)
    head = _choose_head(source, head, contents.kind)
    _add_ends(source, contents, head, adjust)
    parameters = set(source.kept_names)
    norms = GEMMA_NORMS if graph == "gemma3" else NORMS
    for index in range(source.config.num_hidden_layers):
        layer, at = f"model.layers.{index}", f"blk.{index}"
        for path, name in norms.items():
            _add_norm(source, contents, f"{layer}.{path}", f"{at}.{name}", adjust)
        for path, name in QK_NORMS.items():
            if f"{layer}.{path}.weight" in parameters:
                _add_norm(source, contents, f"{layer}.{path}", f"{at}.{name}", adjust)
        for path, name in LINEARS.items():
            _add_linear(source, contents, f"{layer}.{path}", f"{at}.{name}", adjust)
            if graph == "bitnet" and path in SUB_NORMS:
                _add_sub_norm(source, contents, f"{layer}.{path}", f"{at}.{SUB_NORMS[path]}")
    return contents


# ── which graph ──


def choose_graph(source: Source) -> tuple[str, str]:
    """The graph that holds a model exactly, and why. Raises ExportError with what to do where there is none."""
    name = type(source.model).__name__.removesuffix("ForCausalLM")
    if name not in GRAPHS:
        raise ExportError(
            f"no llama.cpp graph is known here for {type(source.model).__name__} (known: {', '.join(GRAPHS)}). Use --to hf."
        )
    if reason := _unlike_its_graph(source, GRAPHS[name]):
        raise ExportError(f"llama.cpp's {GRAPHS[name]} graph cannot hold this model: {reason}. Use --to hf.")
    if source.plan is None:
        return GRAPHS[name], "an ordinary model"
    if not any(linear.normed for linear in source.plan.linears.values()):
        return GRAPHS[name], "no inserted norms"
    if reason := _unlike_bitnet(source, name):
        raise ExportError(
            f"of llama.cpp's graphs only bitnet has norms inside a block, and it cannot hold this model: {reason}. "
            "A model tuned with --placement none fits every graph; for this one use --to native or --to hf."
        )
    return "bitnet", "norms inside the blocks"


def _unlike_its_graph(source: Source, graph: str) -> str | None:
    """What of a model its family's own graph would ignore; None if nothing."""
    config = source.config
    rope = config.rope_parameters
    if graph == "gemma3":
        pattern = [(i + 1) % GEMMA_WINDOW_PATTERN == 0 for i in range(config.num_hidden_layers)]
        if [kind == "full_attention" for kind in config.layer_types] != pattern:
            return f"it takes every {GEMMA_WINDOW_PATTERN}th layer to see all positions"
        if rope["sliding_attention"]["rope_theta"] != GEMMA_LOCAL_BASE:
            return f"it takes {GEMMA_LOCAL_BASE:g} for the base of local positions"
        if config.query_pre_attn_scalar != config.head_dim:
            return "it takes the attention scale from the head size"
        kinds = {rope[name].get("rope_type", "default") for name in rope}
    else:
        kinds = {rope.get("rope_type", "default")}
        if getattr(config, "attention_bias", False) and graph == "qwen3":
            return "it has no biases"
        windows = getattr(config, "layer_types", None) or []
        if "sliding_attention" in windows or (type(config).__name__ == "MistralConfig" and config.sliding_window):
            return "it sees all positions, this model a window of them"
    if odd := kinds - ({"default", "linear", "llama3"} if graph == "llama" else {"default"}):
        return f"rotary positions of the kind {', '.join(sorted(odd))}"
    gate = getattr(config, "hidden_act", None) or config.hidden_activation
    wanted = ("gelu_pytorch_tanh",) if graph == "gemma3" else ("silu", "swish")
    return None if gate in wanted else f"its gate is {wanted[0]}, this model's {gate}"


def _unlike_bitnet(source: Source, name: str) -> str | None:
    plan, config = source.plan, source.config
    assert plan is not None
    if name not in ("Llama", "Mistral", "Qwen2"):
        return f"it has none of the further norms of {name}"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return f"rotary positions of the kind {config.rope_parameters['rope_type']}"
    if not source.tied:
        return "its head is the embedding, this model has one of its own"
    if (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * config.num_attention_heads != (
        config.hidden_size
    ):
        return "its heads fill the width"
    if any(source.has_bias(path) for path in plan.linears):
        return "it has no biases"
    for path, linear in plan.linears.items():
        if linear.normed and linear.fed_by is not None:
            if plan.spec.gain != "scalar":
                return (
                    "norms with a gain per channel in front of q, k, v, gate and up. Tune with --placement output, or with "
                    "--gain scalar where block gains are constant (single-scale norms)"
                )
            gain = source.kept(f"{linear.fed_by}.weight")
            if (gain.max() - gain.min()).item() > 1e-6 * gain.abs().max().item():
                return f"two norms in a row are one only where the first has a constant gain, and {linear.fed_by} has not"
        elif linear.normed != path.endswith(WRITERS):
            return f"{path} has {'a' if linear.normed else 'no'} norm of its own"
    return None


def choose_kind(source: Source, kind: str) -> str:
    """The type of the projections. Raises ExportError if it cannot hold them."""
    if source.plan is None:
        if kind in TERNARY:
            raise ExportError(f"--type {kind} holds ternary weights, and this model is not ternary: use f16 or f32.")
        return "f16" if kind == "auto" else kind
    if kind in DENSE:
        return kind
    obstacles = {name: _does_not_hold(source, name) for name in (("tq2_0", "q2_0") if kind == "auto" else (kind,))}
    if fitting := [name for name, obstacle in obstacles.items() if obstacle is None]:
        return fitting[0]
    if kind == "auto":
        return "f16"
    other = "q2_0 (any width that 64 divides)" if kind != "q2_0" and _does_not_hold(source, "q2_0") is None else "f16"
    raise ExportError(f"--type {kind} cannot hold this model: {obstacles[kind]}. Use --type {other}.")


def _does_not_hold(source: Source, kind: str) -> str | None:
    layout = TERNARY[kind]
    assert source.plan is not None
    group = quant.group_size(source.plan.spec.scale)
    if group is not None and group % layout.BLOCK:
        return f"its blocks have {layout.BLOCK} columns and one scale, this model one scale for {group}"
    for path in source.plan.linears:
        width = int(source.ternary[path].in_features)  # pyright: ignore
        if not layout.fits(width):
            return f"its blocks have {layout.BLOCK} columns, and {path} has {width}, not a multiple"
    return None


def _choose_head(source: Source, head: str, kind: str) -> str:
    width = source.config.hidden_size
    if head == "auto":
        return kind if kind in DENSE and source.plan is None else "q8_0" if width % 32 == 0 else "f16"
    block = KINDS[head][0]
    if width % block:
        raise ExportError(f"--head {head} has blocks of {block} columns, and this model is {width} wide: use f16.")
    return head


# ── numbers that make one ε do ──


@dataclass(frozen=True)
class Adjustments:
    """ε of the file, and factors: on the residual stream (what writes into it, and its embedding), on v and up, and on the
    scales of linears whose norm became one with the block norm in front. merged: those block norms."""

    eps: float
    residual: float = 1.0
    inner: float = 1.0
    scales: dict[str, float] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()


def _adjustments(source: Source, graph: str) -> Adjustments:
    block: float = source.config.rms_norm_eps
    if graph != "bitnet":
        return Adjustments(block)
    plan = source.plan
    assert plan is not None
    inserted = plan.spec.eps
    fed = {path: linear.fed_by for path, linear in plan.linears.items() if linear.normed and linear.fed_by is not None}
    if not fed:  # a norm of k·x with ε is one of x with ε / k²
        return Adjustments(block, inner=math.sqrt(block / inserted))
    scales, left = {}, []
    for path, norm in fed.items():
        first = source.kept(f"{norm}.weight").double().mean().item()
        second = source.gain(path).double().mean().item()
        both = first**2 + inserted
        scales[path] = first * second / math.sqrt(both)
        left.append(block * inserted / both)
    # the merged norms' ε is far below the others': a larger residual stream hides the file's
    residual = 2.0 ** math.ceil(math.log2(math.sqrt(inserted / min(left)))) if min(left) < inserted else 1.0
    return Adjustments(inserted, residual=residual, scales=scales, merged=frozenset(fed.values()))


# ── tensors ──


def _add_ends(source: Source, contents: Contents, head: str, adjust: Adjustments) -> None:
    """Embedding, final norm, head, and rotary factors."""
    embedding = source.embedding_path
    _add_matrix(source, contents, embedding, "token_embd.weight", head, adjust.residual)
    gemma = 1.0 if contents.graph == "gemma3" else 0.0
    width = source.config.hidden_size
    contents.entries.append(
        Entry("output_norm.weight", (width,), "f32", lambda: _f32((source.kept("model.norm.weight") + gemma) / adjust.residual))
    )
    if not source.tied:
        _add_matrix(source, contents, source.head_path, "output.weight", head, 1.0)
    factors = _rotary_factors(source) if contents.graph == "llama" else None
    if factors is not None:
        contents.entries.append(Entry("rope_freqs.weight", tuple(factors.shape), "f32", lambda: _f32(factors)))


def _add_norm(source: Source, contents: Contents, path: str, name: str, adjust: Adjustments) -> None:
    def read() -> np.ndarray:
        weight = source.kept(f"{path}.weight")
        if path in adjust.merged:
            return _f32(torch.ones_like(weight))
        return _f32(weight + 1 if contents.graph == "gemma3" else weight)

    contents.entries.append(Entry(f"{name}.weight", tuple(source.model.get_parameter(f"{path}.weight").shape), "f32", read))


def _add_sub_norm(source: Source, contents: Contents, path: str, name: str) -> None:
    width = int(source.ternary[path].in_features)  # pyright: ignore

    def read() -> np.ndarray:
        return _f32(source.gain(path).expand(width))

    contents.entries.append(Entry(f"{name}.weight", (width,), "f32", read))


def _add_linear(source: Source, contents: Contents, path: str, name: str, adjust: Adjustments) -> None:
    factor = adjust.scales.get(path, 1.0)
    if path.endswith(WRITERS):
        factor *= adjust.residual
    elif path.endswith(("v_proj", "up_proj")):
        factor *= adjust.inner
    _add_matrix(source, contents, path, f"{name}.weight", contents.kind, factor)
    if not source.has_bias(path):
        return
    assert factor == 1.0, path

    def read() -> np.ndarray:
        bias = source.packed(path).bias if path in source.ternary else source.kept(f"{path}.bias")  # pyright: ignore
        rows = _row_order(source, contents.graph, path)
        return _f32(bias if rows is None else bias[rows])  # pyright: ignore

    contents.entries.append(Entry(f"{name}.bias", (int(source.model.get_submodule(path).out_features),), "f32", read))  # pyright: ignore


def _add_matrix(source: Source, contents: Contents, path: str, name: str, kind: str, factor: float) -> None:
    module: Any = source.model.get_submodule(path)
    table = hasattr(module, "num_embeddings")
    shape = (module.num_embeddings, module.embedding_dim) if table else (module.out_features, module.in_features)
    rows = _row_order(source, contents.graph, path)
    if path in source.ternary and kind not in TERNARY and contents.kind in TERNARY:
        kind = contents.kind  # a ternary embedding or head
    if path in source.ternary and kind in TERNARY and not TERNARY[kind].fits(shape[1]):
        raise ExportError(f"--type {kind} cannot hold {path}, which is {shape[1]} wide. Use --type f16.")

    def read() -> np.ndarray:
        if path not in source.ternary:
            weight = source.kept(f"{path}.weight") * factor
            return encode(weight if rows is None else weight[rows], kind)
        packed = source.packed(path)
        codes, scale = packed.codes, packed.scale.float() * abs(factor)
        if factor < 0:
            codes = -codes
        if rows is not None:
            codes, scale = codes[rows], scale[rows] if len(scale) > 1 else scale
        if kind not in TERNARY:
            return encode(quant.ternary_dequantize(codes, scale, packed.granularity), kind)
        layout, group = TERNARY[kind], quant.group_size(packed.granularity)
        blocks = shape[1] // layout.BLOCK
        scale = scale.repeat_interleave(group // layout.BLOCK, dim=1)[:, :blocks] if group else scale
        return layout.pack(codes, scale.expand(shape[0], blocks)).numpy()

    contents.entries.append(Entry(name, shape, kind, read))


def _row_order(source: Source, graph: str, path: str) -> Tensor | None:
    """llama's graph rotates neighbouring pairs, transformers the two halves of a head: the order of q's and k's rows."""
    if graph != "llama" or not path.endswith(("q_proj", "k_proj")):
        return None
    rows = int(source.model.get_submodule(path).out_features)  # pyright: ignore
    heads = source.config.num_attention_heads if path.endswith("q_proj") else source.config.num_key_value_heads
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _f32(tensor: Tensor) -> np.ndarray:
    return encode(tensor, "f32")


# ── metadata ──


def _metadata(source: Source, graph: str, adjust: Adjustments, name: str) -> dict[str, Any]:
    config = source.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters["full_attention"] if graph == "gemma3" else config.rope_parameters
    of_graph: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size, "attention.value_length": size, "attention.layer_norm_rms_epsilon": float(adjust.eps),
        "rope.dimension_count": size, "rope.freq_base": float(rope["rope_theta"]), "vocab_size": vocabulary_size(source),
    }  # fmt: skip
    if graph == "gemma3":
        of_graph["attention.sliding_window"] = config.sliding_window
    return {"general.name": name} | {f"{graph}.{key}": value for key, value in of_graph.items()}


def _rotary_factors(source: Source) -> Tensor | None:
    """What each frequency is divided by, [E/2]; None if nothing is."""
    config = source.config
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert scaling == 1.0, scaling
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / frequencies.double()).float()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, int(value))
