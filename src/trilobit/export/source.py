"""A finished model on disk, read tensor by tensor: what an export is made of, whatever form the model is stored in.

Nothing larger than one matrix is in memory. The structure comes from config.json and the surgery's plan, built without
storage; norms that a form moved into its linears (export/hf.py) are moved back.
"""

import copy
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trilobit import quant
from trilobit.errors import ModelError
from trilobit.export.hf import SMALL_GAIN
from trilobit.infer.load import CARD, PACKED_FILE, clear_errors, load_tokenizer, packed_module, quiet_transformers
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear
from trilobit.storage import read_json, verify_manifest
from trilobit.surgery.ternary import Plan, apply_plan

INDEX = "model.safetensors.index.json"


class Source:
    """A model that trilobit wrote, or an ordinary checkpoint (plan None).

    model: the structure after surgery, on the meta device. ternary: paths of its ternary modules.
    """

    def __init__(self, directory: Path):
        self.directory = _stored(directory)
        card = (
            read_json(self.directory / CARD) if (self.directory / CARD).exists() else {"form": "full precision", "plan": None}
        )
        if (self.directory / CARD).exists():
            verify_manifest(self.directory)
        self.form: str = card["form"]
        if self.form == "native":
            raise ModelError(f"{directory} is written for the native engine: take the run it came from.")
        self.plan = Plan.from_json(card["plan"]) if card["plan"] else None
        self.gains_moved = card.get("norms") == "everywhere"
        with clear_errors(str(directory)):
            self.config: Any = AutoConfig.from_pretrained(self.directory)
            if hasattr(self.config, "quantization_config"):
                if self.plan is None:
                    raise ModelError(f"{directory} is a quantised checkpoint that trilobit did not write.")
                delattr(self.config, "quantization_config")
            with torch.device("meta"), quiet_transformers():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
            self.model.tie_weights()
        if self.plan is not None:
            apply_plan(self.model, self.plan)
        kinds = (TernaryLinear, TernaryEmbedding)
        self.ternary = {name: module for name, module in self.model.named_modules() if isinstance(module, kinds)}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.directory)

    @property
    def head_path(self) -> str:
        """Path of the output head."""
        head = self.model.get_output_embeddings()
        return next(name for name, module in self.model.named_modules() if module is head)

    @property
    def embedding_path(self) -> str:
        """Path of the token embedding."""
        embedding = self.model.get_input_embeddings()
        return next(name for name, module in self.model.named_modules() if module is embedding)

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is the embedding's."""
        return bool(self.config.get_text_config().tie_word_embeddings)

    @torch.no_grad()
    def packed(self, path: str) -> PackedLinear | PackedEmbedding:
        """A ternary module, frozen, with the norm that training gave it. Raises ModelError if the file lacks a part."""
        module = self.ternary[path]
        assert self.plan is not None
        if self.plan.tied and path == self.plan.head and self.plan.embedding is not None:
            shared = self.packed(self.plan.embedding)
            return PackedLinear(shared.codes, shared.scale, None, None, shared.granularity, module.rule.int8_activations)  # pyright: ignore
        if self.form in ("latent", "dense"):
            return self._quantised(module, path)
        parts = {n: self.tensor(n) for n in self._names if n.startswith(f"{path}.") and n.count(".") - path.count(".") <= 2}
        try:
            return packed_module(module, path, parts, self.form)  # pyright: ignore[reportReturnType]
        except KeyError as error:
            raise ModelError(f"{self.directory} does not hold the tensors its {CARD} promises: {error} is missing.") from error

    def kept(self, path: str, name: str = "weight") -> Tensor:
        """A parameter of a module that is not ternary, fp32; block gains as training left them."""
        value = self.tensor(f"{path}.{name}").float()
        if not self.gains_moved or self.plan is None or name != "weight":
            return value
        moved = next((p for p, linear in self.plan.linears.items() if linear.fed_by == path and not linear.normed), None)
        if moved is None:
            return value
        gain = self.tensor(f"{moved}.rms_norm.weight").float()
        if not bool(value.any()):  # norms that multiply by 1 + w: what was left of w is zero
            return gain - 1
        return gain * (SMALL_GAIN / math.sqrt(SMALL_GAIN**2 + self.plan.spec.eps))

    def gain(self, path: str) -> Tensor:
        """Gain of the norm in front of a ternary linear, [K] or [1], fp32."""
        return self.tensor(f"{path}.rms_norm.weight").float()

    def tensor(self, name: str) -> Tensor:
        """A stored tensor. Raises ModelError if there is none of that name."""
        if name not in self._names:
            raise ModelError(f"{self.directory} holds no tensor {name}.")
        try:
            return self._files[self._names[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.directory / self._names[name]} cannot be read: {error}") from error

    def has(self, name: str) -> bool:
        return name in self._names

    def _quantised(self, module: nn.Module, path: str) -> PackedLinear | PackedEmbedding:
        """From trainable latents, or from dense weights, whose granules hold one magnitude each."""
        weight = self.tensor(f"{path}.weight").float()
        if self.form == "dense":
            table = isinstance(module, TernaryEmbedding)
            granularity: quant.Granularity = module.granularity if table else module.rule.granularity  # pyright: ignore
            scale = _largest_magnitude(weight, granularity)
            codes = torch.sign(weight).to(torch.int8)
            if table:
                return PackedEmbedding(codes, scale, granularity)
            bias = self.tensor(f"{path}.bias").float() if self.has(f"{path}.bias") else None
            return PackedLinear(codes, scale, bias, None, granularity, module.rule.int8_activations)  # pyright: ignore
        module = copy.deepcopy(module)
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            value = weight if name == "weight" else self.tensor(f"{path}.{name}").float()
            assert value.shape == parameter.shape, (path, name, value.shape, parameter.shape)
            setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
        return (PackedEmbedding if isinstance(module, TernaryEmbedding) else PackedLinear).from_ternary(module)  # pyright: ignore

    @cached_property
    def _names(self) -> dict[str, str]:
        """Tensor → file."""
        if (self.directory / INDEX).exists():
            return dict(read_json(self.directory / INDEX)["weight_map"])
        file = PACKED_FILE if self.form == "packed" else "model.safetensors"
        try:
            with safe_open(self.directory / file, "pt") as opened:
                return dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.directory / file} cannot be read: {error}") from error

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {file: safe_open(self.directory / file, "pt") for file in set(self._names.values())}


def _largest_magnitude(weight: Tensor, granularity: quant.Granularity) -> Tensor:
    """The scale of each granule of a matrix that holds code · scale, shaped as quant.absmean_scale's."""
    if granularity == "tensor":
        return weight.abs().amax().reshape(1, 1)
    group = quant.group_size(granularity) or weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group))
    return padded.unflatten(1, (-1, group)).abs().amax(dim=2)


def _stored(directory: Path) -> Path:
    """Where in `directory`, a run or a model, the weights are. Dense weights are rounded to bf16: the latents say more."""
    if not (directory / "run.json").exists():
        if not (directory / "config.json").exists():
            raise ModelError(f"{directory} is not a checkpoint directory: it has no config.json.")
        return directory
    if "result" not in read_json(directory / "run.json"):
        raise ModelError(f"{directory} is a run that has not finished: continue it with --resume.")
    places = [directory / name for name in ("model", "latent") if (directory / name / CARD).exists()]
    if not places:
        raise ModelError(f"{directory} holds neither model/ nor latent/.")
    if len(places) > 1 and read_json(places[0] / CARD)["form"] == "dense":
        return places[1]
    return places[0]
