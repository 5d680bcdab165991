"""Models that others wrote, tensor by tensor: transformers' `bitnet` directories and GGUF files (infer/foreign.py and
infer/gguf_model.py read them as a whole)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from trilobit.errors import ModelError
from trilobit.export.source import Source, StoredSource
from trilobit.infer.foreign import bitnet_form, plan_for, sites_of, skeleton
from trilobit.infer.gguf_model import common_granularity, open_model, regrouped
from trilobit.infer.load import GGUF
from trilobit.infer.loaded import check_tokenizer
from trilobit.infer.quiet import clear_errors
from trilobit.infer.stored import CARD
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.quant import Granularity
from trilobit.storage import read_json
from trilobit.surgery.ternary import Plan, apply_plan


def open_source(place: Path, as_stored: bool = False) -> Source:
    """Whatever lies at `place`. as_stored: of StoredSource. Raises ModelError."""
    if place.suffix == GGUF:
        if not place.is_file():
            raise ModelError(f"there is no file {place}.")
        return GgufSource(place)
    ours = any((place / name).exists() for name in ("run.json", CARD))
    if not ours and (place / "config.json").exists() and "quantization_config" in read_json(place / "config.json"):
        return BitnetSource(place)
    return StoredSource(place, as_stored)


class BitnetSource(StoredSource):
    """A `bitnet` directory of transformers, of either class, packed or with latents (`online`)."""

    def _structure(self, as_stored: bool) -> tuple[PreTrainedModel, Plan | None]:
        with clear_errors(str(self.directory)):
            config: Any = AutoConfig.from_pretrained(self.directory)
            form = bitnet_form(str(self.directory), config)
            assert form is not None, self.directory
            self.form = "latent" if form == "online" else form
            return skeleton(config, form, str(self.directory))

    def _require_shapes(self) -> None:
        super()._require_shapes()
        check_tokenizer(self.directory, self.model, self.tokenizer)


class GgufSource(Source):
    """A GGUF file. Its granule is found by reading every ternary matrix once; blocks of zeros have no say in it."""

    form = "gguf"

    def __init__(self, path: Path):
        model, tokenizer, tensors = open_model(path, "meta")
        check_tokenizer(path, model, tokenizer)
        self.tensors = tensors
        plan = None
        if tensors.ternary:
            self.granularity: Granularity = common_granularity(map(tensors.blocks, tensors.ternary))
            tied = model.config.get_text_config().tie_word_embeddings
            shared = ["lm_head"] if tied and "model.embed_tokens" in tensors.ternary else []
            with clear_errors(str(path)):
                normed = dict.fromkeys([*tensors.ternary, *shared], False)
                plan = plan_for(model, tensors.spec(self.granularity), sites_of(model), normed, str(path))
            apply_plan(model, plan)
        super().__init__(model, plan, tokenizer)

    def kept(self, name: str) -> Tensor:
        return self.tensors.dense(name)

    def norm(self, path: str) -> nn.Module:
        raise AssertionError("GGUF files have no norms that could be moved")

    @torch.no_grad()
    def _freeze(self, path: str) -> PackedLinear | PackedEmbedding:
        module: Any = self.ternary[path]
        assert self.plan is not None
        own = path in self.tensors.ternary
        blocks = self.tensors.blocks(path if own else str(self.plan.embedding))
        scale = regrouped(blocks, self.granularity)
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(blocks[0], scale, self.granularity)
        bias = self.tensors.dense(f"{path}.bias") if module.bias is not None else None
        return PackedLinear(blocks[0], scale, bias, None, self.granularity, self.tensors.header.int8)
