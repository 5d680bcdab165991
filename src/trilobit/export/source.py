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
from trilobit.infer.loaded import load_tokenizer
from trilobit.infer.parts import Kind, kind_of
from trilobit.infer.quiet import clear_errors, quiet_transformers
from trilobit.infer.stored import CARD, SMALL_GAIN, packed_module, read_tensor, tensor_files, tensor_shapes, with_every_norm
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear
from trilobit.storage import read_json, verify_manifest
from trilobit.surgery.ternary import Plan, apply_plan
from trilobit.tensors import whole

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
        """A block norm that can be called. Of a model in parts every rank has to ask."""
        norm = self.model.get_submodule(path)
        return copy.deepcopy(norm, {id(p): nn.Parameter(whole(p), requires_grad=False) for p in norm.parameters()})

    def gain(self, path: str) -> Tensor:
        """Gain of the norm in front of a ternary linear, [K] or [1], fp32."""
        norm: Any = self.model.get_submodule(f"{path}.rms_norm")
        return norm.weight.detach().float()

    def has_bias(self, path: str) -> bool:
        module: Any = self.model.get_submodule(path)
        return module.bias is not None or bool(getattr(module, "dead_zone_bias", 0))

    def kind(self, path: str) -> Kind | None:
        """What a ternary module is; None if it is not ternary."""
        module: Any = self.ternary.get(path)
        if module is None or isinstance(module, PackedLinear | PackedEmbedding):
            return None if module is None else kind_of(module)
        if isinstance(module, TernaryEmbedding):
            return Kind(module.granularity)
        rule, norm = module.rule, module.rms_norm
        eps, gain = (None, 0) if norm is None else (norm.eps, self.gain_length(path))
        return Kind(rule.granularity, rule.int8_activations, self.has_bias(path), eps, gain)

    def gain_length(self, path: str) -> int:
        """Of the gain of the norm in front of a ternary linear: 1 or K."""
        return len(self.model.get_parameter(f"{path}.rms_norm.weight"))

    def shares_table(self) -> bool:
        """Whether a ternary head has the codes and scales of a ternary embedding."""
        return self.tied

    @torch.no_grad()
    def _freeze(self, path: str) -> PackedLinear | PackedEmbedding:
        module: Any = self.ternary[path]
        if isinstance(module, PackedLinear | PackedEmbedding):
            return module
        return freeze_module(module, path)


class StoredSource(Source):
    """A directory that trilobit wrote, or an ordinary checkpoint: nothing is read before it is asked for.

    as_stored: leave block gains that a form moved into the linears where they are, as load() does.
    """

    def __init__(self, directory: Path, as_stored: bool = False):
        self.directory = directory = _stored(directory)
        self.gains_moved = False
        model, plan = self._structure(as_stored)
        if plan is not None:
            apply_plan(model, plan)
        super().__init__(model, plan, load_tokenizer(directory))
        if (directory / "generation_config.json").exists():
            with clear_errors(str(directory)):
                model.generation_config = GenerationConfig.from_pretrained(directory)
        self._require_shapes()

    def _structure(self, as_stored: bool) -> tuple[PreTrainedModel, Plan | None]:
        """The model without storage, before surgery, and its plan; form and gains_moved are set."""
        card = {"form": "full precision", "plan": None}
        if (self.directory / CARD).exists():
            verify_manifest(self.directory)
            card = read_json(self.directory / CARD)
        self.form = card["form"]
        if self.form == "native":
            raise ModelError(f"{self.directory} is written for the native engine: take the run it came from.")
        plan = Plan.from_json(card["plan"]) if card["plan"] else None
        with clear_errors(str(self.directory)):
            config: Any = AutoConfig.from_pretrained(self.directory)
            if hasattr(config, "quantization_config"):
                delattr(config, "quantization_config")
            with torch.device("meta"), quiet_transformers():
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.tie_weights()
        self.gains_moved = card.get("norms") == "everywhere"
        if as_stored and self.gains_moved and plan is not None:
            self.gains_moved, plan = False, with_every_norm(plan)
        return model, plan

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
        dead_zone = self.form == "latent" and self.plan is not None and self.plan.spec.dead_zone_bias and path in self.ternary
        return f"{path}.bias" in self._files or bool(dead_zone)

    def gain_length(self, path: str) -> int:
        return math.prod(self._shapes.get(f"{path}.rms_norm.weight", (0,)))

    def tensor(self, name: str) -> Tensor:
        """A stored tensor. Raises ModelError if there is none of that name."""
        if name not in self._files:
            raise ModelError(f"{self.directory} does not hold the tensors its files promise: {name} is missing.")
        return read_tensor(self.directory / self._files[name], name)

    @cached_property
    def _files(self) -> dict[str, str]:
        return tensor_files(self.directory, self.form)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: s for file in set(self._files.values()) for n, s in tensor_shapes(self.directory / file).items()}

    def _require_shapes(self) -> None:
        """Raise ModelError unless the files hold what the configuration asks for, in the shapes it asks for."""
        wanted: dict[str, tuple[int, ...]] = {n: tuple(self.model.get_parameter(n).shape) for n in self.kept_names}
        for path, module in self.ternary.items():
            owner: Any = module
            shared = self.plan is not None and path == self.plan.head and self.plan.tied
            table = isinstance(module, TernaryEmbedding)
            rows, columns = (owner.num_embeddings, owner.embedding_dim) if table else owner.weight.shape
            if self.form.endswith("bitlinear"):
                wanted |= {f"{path}.weight": (rows // 4, columns), f"{path}.weight_scale": (1,)}
            elif self.form == "packed" and not shared:
                wanted[f"{path}.codes"] = (rows, -(-columns // 4))
            elif not shared:
                wanted[f"{path}.weight"] = (rows, columns)
            if getattr(owner, "bias", None) is not None:
                wanted[f"{path}.bias"] = (rows,)
            norm = f"{path}.rms_norm.weight"
            if getattr(owner, "rms_norm", None) is not None and self._shapes.get(norm) != (1,):
                wanted[norm] = (columns,)
        for name, shape in wanted.items():
            if name not in self._shapes:
                raise ModelError(f"{self.directory} does not hold the tensors its files promise: {name} is missing.")
            if self._shapes[name] != shape:
                raise ModelError(
                    f"the weights of {self.directory} do not fit its config.json: {name} is {self._shapes[name]}, not {shape}."
                )

    @torch.no_grad()
    def _freeze(self, path: str) -> PackedLinear | PackedEmbedding:
        module: Any = copy.deepcopy(self.ternary[path])  # what becomes of it is not kept
        assert self.plan is not None
        if self.plan.tied and path == self.plan.head and self.plan.embedding is not None and self.form != "latent":
            shared = self._freeze(self.plan.embedding)
            bias = self.tensor(f"{path}.bias").float() if self.has_bias(path) else None
            return PackedLinear(shared.codes, shared.scale, bias, None, shared.granularity, module.rule.int8_activations)
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
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            stored = f"{path}.{name}"
            if stored not in self._files and self.plan is not None and path == self.plan.head:  # tied: stored once
                stored = f"{self.plan.embedding}.{name}"
            value = self.tensor(stored).float()
            assert value.shape == parameter.shape, (path, name, value.shape, parameter.shape)
            setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
        return freeze_module(module, path)

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


def freeze_module(module: TernaryLinear | TernaryEmbedding, path: str) -> PackedLinear | PackedEmbedding:
    """The frozen form of a trained ternary module. Raises ModelError if it is not quantised all the way yet."""
    for strength in (module.weight_strength, module.activation_strength):
        if isinstance(strength, Tensor) or strength != 1:
            raise ModelError(f"{path} is still fading in (λ = {float(strength):.3g}): only a finished model is written.")
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
            what = "is not a checkpoint directory: it has no config.json" if directory.exists() else "is not there"
            raise ModelError(f"{directory} {what}.")
        return directory
    if "result" not in read_json(directory / "run.json"):
        raise ModelError(f"{directory} is a run that has not finished: continue it with --resume.")
    places = [directory / name for name in ("model", "latent") if (directory / name / CARD).exists()]
    if not places:
        raise ModelError(f"{directory} holds neither model/ nor latent/.")
    if len(places) > 1 and read_json(places[0] / CARD)["form"] == "dense":
        return places[1]
    return places[0]
