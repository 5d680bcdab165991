"""A finished model, tensor by tensor: what an export is made of, whether the model is in memory or in a directory.

From a directory, in whatever form it is stored there, nothing larger than one matrix is in memory: the structure comes from
config.json and the surgery's plan, built without storage, and norms that a form moved into its linears (forms.py) are moved
back.
"""

import copy
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trilobit import quant
from trilobit.errors import ModelError
from trilobit.infer.load import (
    CARD,
    SMALL_GAIN,
    clear_errors,
    load_tokenizer,
    packed_module,
    quiet_transformers,
    read_tensor,
    tensor_files,
)  # fmt: skip
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear
from trilobit.storage import read_json, verify_manifest
from trilobit.surgery.ternary import Plan, apply_plan

TERNARY = (TernaryLinear, TernaryEmbedding, PackedLinear, PackedEmbedding)


class Source:
    """A model in memory, after surgery (plan None: an ordinary one), trained or frozen.

    ternary: its ternary modules by path.
    """

    form = "in memory"

    def __init__(self, model: PreTrainedModel, plan: Plan | None, tokenizer: Any = None):
        self.model, self.plan, self.tokenizer = model, plan, tokenizer
        self.config: Any = model.config
        self.ternary = {name: module for name, module in model.named_modules() if isinstance(module, TERNARY)}
        self._latest: tuple[str, PackedLinear | PackedEmbedding] | None = None

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

    @property
    def kept_names(self) -> list[str]:
        """Parameters outside the ternary modules, each once."""
        return [n for n, _ in self.model.named_parameters() if not any(n.startswith(f"{path}.") for path in self.ternary)]

    def packed(self, path: str) -> PackedLinear | PackedEmbedding:
        """A ternary module, frozen, with the norm that training gave it. Raises ModelError if a part is missing."""
        if self._latest is None or self._latest[0] != path:  # its parts are asked for one after another
            self._latest = path, self._freeze(path)
        return self._latest[1]

    def kept(self, name: str) -> Tensor:
        """A parameter outside the ternary modules, fp32; block gains as training left them."""
        return self.model.get_parameter(name).detach().float()

    def norm(self, path: str) -> nn.Module:
        """A block norm that can be called."""
        return self.model.get_submodule(path)

    def gain(self, path: str) -> Tensor:
        """Gain of the norm in front of a ternary linear, [K] or [1], fp32."""
        norm: Any = self.model.get_submodule(f"{path}.rms_norm")
        return norm.weight.detach().float()

    def has_bias(self, path: str) -> bool:
        module: Any = self.model.get_submodule(path)
        return module.bias is not None or bool(getattr(module, "dead_zone_bias", 0))

    @torch.no_grad()
    def _freeze(self, path: str) -> PackedLinear | PackedEmbedding:
        module: Any = self.ternary[path]
        if isinstance(module, PackedLinear | PackedEmbedding):
            return module
        return freeze_module(module)


class StoredSource(Source):
    """A directory that trilobit wrote, or an ordinary checkpoint: nothing is read before it is asked for."""

    def __init__(self, directory: Path):
        self.directory = _stored(directory)
        card = {"form": "full precision", "plan": None}
        if (self.directory / CARD).exists():
            verify_manifest(self.directory)
            card = read_json(self.directory / CARD)
        if card["form"] == "native":
            raise ModelError(f"{directory} is written for the native engine: take the run it came from.")
        plan = Plan.from_json(card["plan"]) if card["plan"] else None
        with clear_errors(str(directory)):
            config: Any = AutoConfig.from_pretrained(self.directory)
            if hasattr(config, "quantization_config"):
                if plan is None:
                    raise ModelError(f"{directory} is quantised, and not by trilobit: of exports --to native takes it.")
                delattr(config, "quantization_config")
            with torch.device("meta"), quiet_transformers():
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.tie_weights()
        if plan is not None:
            apply_plan(model, plan)
        super().__init__(model, plan, load_tokenizer(self.directory))
        if (self.directory / "generation_config.json").exists():
            with clear_errors(str(directory)):
                model.generation_config = GenerationConfig.from_pretrained(self.directory)
        self.form = card["form"]
        self.gains_moved = card.get("norms") == "everywhere"

    def kept(self, name: str) -> Tensor:
        value = self.tensor(name).float()
        path, _, last = name.rpartition(".")
        if not self.gains_moved or self.plan is None or last != "weight":
            return value
        moved = next((p for p, linear in self.plan.linears.items() if linear.fed_by == path and not linear.normed), None)
        if moved is None:
            return value
        gain = self.gain(moved)
        if not bool(value.any()):  # norms that multiply by 1 + w: what was left of w is zero
            return gain - 1
        return gain * (SMALL_GAIN / math.sqrt(SMALL_GAIN**2 + self.plan.spec.eps))

    def norm(self, path: str) -> nn.Module:
        norm = copy.deepcopy(self.model.get_submodule(path))
        norm.weight = nn.Parameter(self.kept(f"{path}.weight"), requires_grad=False)
        return norm

    def gain(self, path: str) -> Tensor:
        return self.tensor(f"{path}.rms_norm.weight").float()

    def has_bias(self, path: str) -> bool:
        dead_zone = self.plan is not None and self.plan.spec.dead_zone_bias and path in self.ternary
        return f"{path}.bias" in self._files or bool(dead_zone)

    def tensor(self, name: str) -> Tensor:
        """A stored tensor. Raises ModelError if there is none of that name."""
        if name not in self._files:
            raise ModelError(f"{self.directory} does not hold the tensors its files promise: {name} is missing.")
        return read_tensor(self.directory / self._files[name], name)

    @cached_property
    def _files(self) -> dict[str, str]:
        return tensor_files(self.directory, self.form)

    @torch.no_grad()
    def _freeze(self, path: str) -> PackedLinear | PackedEmbedding:
        module: Any = self.ternary[path]
        assert self.plan is not None
        if self.plan.tied and path == self.plan.head and self.plan.embedding is not None:
            shared = self._freeze(self.plan.embedding)
            return PackedLinear(shared.codes, shared.scale, None, None, shared.granularity, module.rule.int8_activations)
        if self.form == "latent":
            return self._from_latent(module, path)
        if self.form == "dense":
            return self._from_dense(module, path)
        names = [name for name in self._files if name.startswith(f"{path}.")]
        try:
            return packed_module(module, path, {name: self.tensor(name) for name in names}, self.form)  # pyright: ignore
        except KeyError as error:
            raise ModelError(f"{self.directory} does not hold the tensors its {CARD} promises: {error} is missing.") from error

    def _from_latent(self, module: Any, path: str) -> PackedLinear | PackedEmbedding:
        module = copy.deepcopy(module)
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            value = self.tensor(f"{path}.{name}").float()
            assert value.shape == parameter.shape, (path, name, value.shape, parameter.shape)
            setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
        return freeze_module(module)

    def _from_dense(self, module: Any, path: str) -> PackedLinear | PackedEmbedding:
        """Each granule of a dense weight holds one magnitude."""
        weight = self.tensor(f"{path}.weight").float()
        table = isinstance(module, TernaryEmbedding)
        granularity: quant.Granularity = module.granularity if table else module.rule.granularity
        scale, codes = _largest_magnitude(weight, granularity), torch.sign(weight).to(torch.int8)
        if table:
            return PackedEmbedding(codes, scale, granularity)
        bias = self.tensor(f"{path}.bias").float() if self.has_bias(path) else None
        return PackedLinear(codes, scale, bias, None, granularity, module.rule.int8_activations)


def freeze_module(module: TernaryLinear | TernaryEmbedding) -> PackedLinear | PackedEmbedding:
    """The frozen form of a trained ternary module."""
    return PackedLinear.from_ternary(module) if isinstance(module, TernaryLinear) else PackedEmbedding.from_ternary(module)


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
            hint = ": --to native takes GGUF files" if directory.suffix == ".gguf" else ": it has no config.json"
            raise ModelError(f"{directory} is not a checkpoint directory{hint}.")
        return directory
    if "result" not in read_json(directory / "run.json"):
        raise ModelError(f"{directory} is a run that has not finished: continue it with --resume.")
    places = [directory / name for name in ("model", "latent") if (directory / name / CARD).exists()]
    if not places:
        raise ModelError(f"{directory} holds neither model/ nor latent/.")
    if len(places) > 1 and read_json(places[0] / CARD)["form"] == "dense":
        return places[1]
    return places[0]
