"""A model from a GGUF file, with the file's own numbers: ternary matrices as codes and scales, the rest as fp32.

    metadata  ──▶ config, names and shapes (gguf_header.py), tokenizer (gguf_tokenizer.py)
    tensors   ──▶ PackedLinear, PackedEmbedding where the type is ternary (TQ1_0, TQ2_0, Q2_0); else dequantised

What llama.cpp stores otherwise is undone: `llama` has its query and key rows in the order of the other kind of rotary
positions, `gemma3` its norms plus one. Scales lie in the blocks of 64, 128 or 256 columns; where all of a model's matrices
(or rows) have a single scale, blocks of zeros aside, that is what is kept. `bitnet` is a graph of int8 activations, one scale
a token; the others are weights-only: their files do not say what the model was trained with, and llama.cpp's rounding of
activations is its own.

Letters: D width, H heads, E head size, O outputs, K inputs, G blocks of a row.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from trilobit.errors import ModelError
from trilobit.infer.foreign import plan_of
from trilobit.infer.gguf_file import GgufFile, open_gguf
from trilobit.infer.gguf_header import GgufHeader
from trilobit.infer.gguf_tokenizer import end_tokens, read_tokenizer
from trilobit.infer.quiet import clear_errors, quiet_transformers
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.quant import Granularity
from trilobit.surgery.ternary import Plan, TernarySpec

Blocks = tuple[Tensor, Tensor, int]
"""Codes [O, K] int8, scales [O, G] fp32, columns of a block."""


def read_gguf(path: Path) -> tuple[PreTrainedModel, Any, Plan | None]:
    """Model with frozen ternary modules, tokenizer, and plan (None: no matrix of the file is ternary). Raises ModelError."""
    model, tokenizer, tensors = open_model(path)
    granularity = _fill(model, tensors)
    model.requires_grad_(False).eval()
    if granularity is None:
        return model, tokenizer, None
    with clear_errors(str(path)):
        return model, tokenizer, plan_of(model, tensors.spec(granularity), str(path))


def open_model(path: Path, device: str = "cpu") -> tuple[PreTrainedModel, Any, "ModelTensors"]:
    """An ordinary model of the file's configuration, not filled (on `meta`, without storage), tokenizer, and what to fill it
    with. Raises ModelError."""
    file = open_gguf(path)
    try:
        header = GgufHeader(file)
        header.check()
        tokenizer = read_tokenizer(file.metadata, path.parent, header.vocabulary)
        with clear_errors(str(path)):
            config = header.config()
        with clear_errors(str(path)), no_init_weights(), quiet_transformers(), torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ModelError as error:
        text = str(error)
        raise ModelError(text if str(path) in text else f"{path} cannot be read: {text}") from error
    model.tie_weights()
    ends = end_tokens(file.metadata)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = ends or None
        model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return model, tokenizer, ModelTensors(header)


class ModelTensors:
    """A file's tensors, by the paths and in the order of rows that they have in the transformers model.

    ternary: paths of the modules whose matrices are ternary. parameters: those of all other tensors.
    """

    def __init__(self, header: GgufHeader):
        self.header = header
        names = {path: name for name, (path, _) in header.expected().items()}
        is_ternary = {p: header.file.tensors[n].ternary is not None and _may_be_ternary(header, n) for p, n in names.items()}
        self._names = names
        self.ternary = [path.removesuffix(".weight") for path, ternary in is_ternary.items() if ternary]
        self.parameters = [path for path, ternary in is_ternary.items() if not ternary]

    def spec(self, granularity: Granularity) -> TernarySpec:
        return TernarySpec(placement="none", activations="int8" if self.header.int8 else "none", scale=granularity)

    def dense(self, path: str) -> Tensor:
        """A parameter, fp32. Raises ModelError where it is not finite."""
        name, file = self._names[path], self.header.file
        values = _reordered(self.header, name, file.dense(name)) * _factor(file, name)
        if not bool(torch.isfinite(values).all()):
            raise ModelError(f"{file.path}: {name} holds numbers that are not finite: it is damaged.")
        return values - 1 if self.header.name == "gemma3" and name.endswith("norm.weight") else values

    def blocks(self, path: str) -> Blocks:
        """The matrix of a ternary module."""
        name, file = self._names[f"{path}.weight"], self.header.file
        codes, scales = (_reordered(self.header, name, part) for part in file.ternary(name))
        place = file.tensors[name].ternary
        assert place is not None, name
        return codes, scales * _factor(file, name), place.BLOCK


def _fill(model: PreTrainedModel, tensors: ModelTensors) -> Granularity | None:
    """Put the file's tensors into the model, ternary ones in modules of their own. The granule of all their scales, None if
    there are none."""
    header, parameters = tensors.header, dict(model.named_parameters())
    with torch.no_grad():
        for path in tensors.parameters:
            parameters[path].copy_(tensors.dense(path))
    ternary = {path: tensors.blocks(path) for path in tensors.ternary}
    if not ternary:
        return None
    granularity = common_granularity(ternary.values())
    for path, blocks in ternary.items():
        codes, scale = blocks[0], regrouped(blocks, granularity)
        old = model.get_submodule(path)
        if isinstance(old, nn.Embedding):
            model.set_submodule(path, PackedEmbedding(codes, scale, granularity))
            if header.tied:
                model.set_submodule("lm_head", PackedLinear(codes, scale, None, None, granularity, header.int8))
        else:
            bias = cast(nn.Linear, old).bias
            model.set_submodule(path, PackedLinear(codes, scale, bias, None, granularity, header.int8))
    return granularity


def _may_be_ternary(header: GgufHeader, name: str) -> bool:
    """Projections, and the embedding and the head of weights-only models; Gemma multiplies its embedding by √D."""
    return name.startswith("blk.") or not (header.int8 or header.name == "gemma3")


def _factor(file: GgufFile, name: str) -> Tensor:
    scale = name.removesuffix("weight") + "scale"
    return file.dense(scale) if name.endswith(".weight") and scale in file.tensors else torch.ones(1)


def _reordered(header: GgufHeader, name: str, rows: Tensor) -> Tensor:
    """Rows of a `llama` query or key matrix (or its bias, or its scales) in transformers' order: [H, E/2, 2] → [H, 2, E/2]."""
    part = name.split(".")[-2]
    if header.name != "llama" or part not in ("attn_q", "attn_k"):
        return rows
    heads = header.heads if part == "attn_q" else header.kv_heads
    return rows.reshape(heads, header.head_size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def common_granularity(matrices: Iterable[Blocks]) -> Granularity:
    """The largest granule that every matrix has one scale for, blocks of zeros aside. Each is looked at once."""
    spreads, smallest = set(), 0
    for codes, scales, block in matrices:
        used = codes.unflatten(1, (-1, block)).any(dim=2)
        most = torch.where(used, scales, -torch.inf)
        least = torch.where(used, scales, torch.inf)
        rows = bool((most.amax(dim=1) <= least.amin(dim=1)).all())
        spreads.add("tensor" if bool(most.max() <= least.min()) else "row" if rows else "group")
        smallest = min(smallest or block, block)
    if "group" in spreads:
        return cast(Granularity, f"group-{smallest}")
    return "row" if "row" in spreads else "tensor"


def regrouped(blocks: Blocks, granularity: Granularity) -> Tensor:
    """Scales of blocks as PackedLinear has them for a granule."""
    codes, scales, block = blocks
    if granularity.startswith("group-"):
        return scales.repeat_interleave(block // int(granularity.removeprefix("group-")), dim=1)
    used = torch.where(codes.unflatten(1, (-1, block)).any(dim=2), scales, 0)
    return used.amax().reshape(1, 1) if granularity == "tensor" else used.amax(dim=1, keepdim=True)
