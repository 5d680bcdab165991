"""GGUF files that stock llama.cpp runs, written tensor by tensor: names, shapes, numbers and metadata.

Which graph and types: gguf_graph.py; the tokenizer: gguf_vocabulary.py. Scales are written into the blocks: the optional
`.scale` tensors are ignored, silently, by some graphs. Tables of names are those of the reader (infer/gguf_header.py).
"""

import math
from collections.abc import Callable
from contextlib import closing
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
from trilobit.export.gguf_graph import TERNARY, WRITERS, Adjustments, adjustments, choose_graph, choose_head, choose_kind
from trilobit.export.gguf_vocabulary import add_vocabulary
from trilobit.export.source import Source
from trilobit.infer.engine import end_tokens
from trilobit.infer.gguf_header import BLOCK_NORMS, GEMMA_NORMS, HEAD_NORMS, LINEARS
from trilobit.infer.gguf_header import SUB_NORMS as OWN_SUB_NORMS
from trilobit.listener import SILENT, Listener, timed

SUB_NORMS = {"attn_output": "attn_sub_norm", "ffn_down": "ffn_sub_norm"}  # bitnet's, in front of these


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
    written = timed(listener, "Writing tensors")
    with closing(gguf.GGUFWriter(target, contents.graph)) as writer:
        for key, value in contents.metadata.items():
            _add(writer, key, value)
        add_vocabulary(writer, source.tokenizer, vocabulary_size(source), _ends(source))
        for entry in contents.entries:
            block, size, number = KINDS[entry.kind]
            if number not in gguf.GGML_QUANT_SIZES:  # the package's own table, which Q2_0 is newer than
                gguf.GGML_QUANT_SIZES[number] = (block, size)  # pyright: ignore[reportArgumentType]
            stored = (*entry.shape[:-1], entry.shape[-1] // block * size)
            writer.add_tensor_info(entry.name, stored, np.dtype(np.uint8), entry.bytes, number)  # pyright: ignore[reportArgumentType]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    # The package would write the data by numpy's tofile, which does not notice that the disk is full for the last bytes.
    with target.open("ab") as file:
        for index, entry in enumerate(contents.entries):
            file.write(b"\0" * (-file.tell() % writer.data_alignment))
            data = np.ascontiguousarray(entry.read()).view(np.uint8)
            assert data.nbytes == entry.bytes, (entry.name, data.nbytes, entry.bytes)
            file.write(data.data)
            written(index + 1, len(contents.entries))
        file.write(b"\0" * (-file.tell() % writer.data_alignment))
    return contents


def vocabulary_size(source: Source) -> int:
    return int(source.model.get_input_embeddings().num_embeddings)  # pyright: ignore


def _ends(source: Source) -> list[int]:
    """The tokens that end a text: generation_config.json's, or, where it has none, config.json's."""
    ends: Any = end_tokens(source.model) or getattr(source.config, "eos_token_id", None)
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def plan_file(source: Source, kind: str, head: str, name: str = "model") -> Contents:
    """Decide graph, types and numbers from the structure alone. Raises ExportError."""
    graph, reason = choose_graph(source)
    contents = Contents(graph, choose_kind(source, kind), reason)
    adjust = adjustments(source, graph)
    contents.metadata = _metadata(source, graph, adjust, name)
    head = choose_head(source, head, contents.kind)
    _add_ends(source, contents, head, adjust)
    parameters = set(source.kept_names)
    normed = {path for path, linear in source.plan.linears.items() if linear.normed} if source.plan is not None else set()
    norms = GEMMA_NORMS if graph == "gemma3" else BLOCK_NORMS
    for index in range(source.config.num_hidden_layers):
        layer, at = f"model.layers.{index}", f"blk.{index}"
        for name, path in norms.items():
            _add_norm(source, contents, f"{layer}.{path}", f"{at}.{name}", adjust)
        for name, path in (HEAD_NORMS | OWN_SUB_NORMS).items():
            if f"{layer}.{path}.weight" in parameters:
                _add_norm(source, contents, f"{layer}.{path}", f"{at}.{name}", adjust)
        for name, path in LINEARS.items():
            _add_linear(source, contents, f"{layer}.{path}", f"{at}.{name}", adjust)
            if graph == "bitnet" and name in SUB_NORMS and f"{layer}.{path}" in normed:
                _add_sub_norm(source, contents, f"{layer}.{path}", f"{at}.{SUB_NORMS[name]}")
    return contents


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
    elif path not in source.ternary and kind in TERNARY:
        kind = "f16"  # a projection that was left as it was
    if path in source.ternary and kind in TERNARY and not TERNARY[kind].fits(shape[1]):
        raise ExportError(f"--type {kind} cannot hold {path}, which is {shape[1]} wide. Use --type f16.")

    def read() -> np.ndarray:
        if path not in source.ternary:
            weight = source.kept(f"{path}.weight")
            weight = weight if factor == 1 else weight * factor
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
