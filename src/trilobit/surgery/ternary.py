"""ternarize: every eligible linear inside the decoder layers becomes a TernaryLinear.

The method is "An Extra RMSNorm is All You Need for Fine Tuning to 1.58 Bits" (arXiv 2505.08823): a learnable norm before
every projection, then training with quantisation faded in. Its choices, and the ones around it, are options here so that
each can be priced: where norms go, what their gains start from, the granule of the scale, what is covered.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilobit.errors import ModelError
from trilobit.nn.ternary import TernaryEmbedding, TernaryLinear, TernaryModule
from trilobit.quant import Granularity
from trilobit.surgery.roles import Role, Roles, decoder_layers, evaluating, find_roles

Placement = Literal["every", "output", "none"]
Gain = Literal["vector", "scalar"]
GainInit = Literal["ones", "calibrated"]
Activations = Literal["int8", "none"]
Cover = Literal["projections", "+lm_head", "+embeddings"]

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class TernarySpec:
    """Which model `ternarize` makes of another. Stored beside the weights; with them it determines the function."""

    placement: Placement = "every"
    gain: Gain = "vector"
    activations: Activations = "int8"
    scale: Granularity = "tensor"
    cover: Cover = "projections"
    dead_zone_bias: float = 0.0
    learned_ranges: bool = False
    eps: float = NORM_EPS


@dataclass(frozen=True)
class PlannedLinear:
    """One linear that becomes ternary: whether it gets a norm of its own, and the block norm it reads directly, if any."""

    normed: bool
    role: Role
    fed_by: str | None


@dataclass(frozen=True)
class Plan:
    """Which modules of a model become ternary, and how. Stored beside the weights, so that loading needs no probe."""

    spec: TernarySpec
    linears: dict[str, PlannedLinear]
    embedding: str | None
    head: str | None
    tied: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Plan":
        linears = {path: PlannedLinear(**entry) for path, entry in value["linears"].items()}
        return cls(TernarySpec(**value["spec"]), linears, value["embedding"], value["head"], value["tied"])


@dataclass(frozen=True)
class Row:
    """What became of one group of modules: how many, and how many parameters they hold."""

    what: str
    became: str
    modules: int
    parameters: int


def show_rows(rows: Iterable[Row], parameters: int) -> str:
    """A partition as a table: modules, what they are, their parameters, what they became; the total last."""
    lines = [f"{row.modules:>5} × {row.what:<34} {row.parameters:>14,}  {row.became}" for row in rows]
    return "\n".join([*lines, f"{'':>5}   {'total':<34} {parameters:>14,}"])


@dataclass(frozen=True)
class Surgery:
    """The partition of a model's parameters by what became of their module. Adds up to `model.parameters()`."""

    plan: Plan
    rows: tuple[Row, ...]
    parameters: int

    def __str__(self) -> str:
        return show_rows(self.rows, self.parameters)


def ternarize(
    model: PreTrainedModel, spec: TernarySpec | None = None, *, calibration: Iterable[Tensor] = (), roles: Roles | None = None
) -> Surgery:
    """Replace, in place, the linears of `model` that `spec` covers by ternary ones at λ = 1.

    calibration: token batches [B, T]; where given, each inserted gain starts at the median RMS its input has on them, so
    that norms keep the function of an ordinary token; where empty, gains start at one. Returns the table of what became
    what, whose parts are asserted to add up to the model's parameters. Raises ModelError for what roles.py refuses.
    """
    plan = make_plan(roles or find_roles(model), spec or TernarySpec())
    measured = measure_rms(model, [path for path, linear in plan.linears.items() if linear.normed], calibration)
    surgery = apply_plan(model, plan)
    set_gains(model, measured)
    return surgery


def make_plan(roles: Roles, spec: TernarySpec) -> Plan:
    """Decide what becomes ternary, from the roles alone."""
    linears = {}
    for site in roles.sites:
        normed = spec.placement == "every" or (spec.placement == "output" and site.role != "input")
        linears[site.path] = PlannedLinear(normed, site.role, site.norm)
    embeddings = spec.cover == "+embeddings" or (roles.tied and spec.cover == "+lm_head")
    head = spec.cover != "projections"
    return Plan(spec, linears, roles.embedding if embeddings else None, roles.head if head else None, roles.tied)


def apply_plan(model: PreTrainedModel, plan: Plan) -> Surgery:
    """Swap the planned modules of `model` in place, gains at one, λ at one."""
    _refuse_foreign_cover(model, plan)
    spec = plan.spec
    labels: dict[int, tuple[str, str]] = {}
    for path, planned in plan.linears.items():
        linear = model.get_submodule(path)
        assert type(linear) is nn.Linear, (path, type(linear))
        norm = spec.gain if planned.normed else None
        ternary = TernaryLinear.from_linear(linear, **_options(spec, norm)).train(linear.training)
        if ternary.rms_norm is not None:
            labels[id(ternary.rms_norm)] = ("inserted norm", f"{spec.gain} gain")
        labels[id(ternary)] = (f"linear ({planned.role})", _became(spec, norm))
        model.set_submodule(path, ternary)
    if plan.embedding is not None:
        embedding = model.get_submodule(plan.embedding)
        assert isinstance(embedding, nn.Embedding), type(embedding)
        ternary = TernaryEmbedding.from_embedding(embedding, spec.scale).train(embedding.training)
        model.set_submodule(plan.embedding, ternary)
        labels[id(ternary)] = ("embedding", _became(spec, None))
    if plan.head is not None:
        head = model.get_submodule(plan.head)
        assert type(head) is nn.Linear, type(head)
        ternary = TernaryLinear.from_linear(head, **_options(spec, None)).train(head.training)
        if plan.tied:
            assert plan.embedding is not None
            ternary.weight = model.get_submodule(plan.embedding).weight  # pyright: ignore[reportAttributeAccessIssue]
        model.set_submodule(plan.head, ternary)
        labels[id(ternary)] = ("lm_head", _became(spec, None))
    return _partition(model, plan, labels)


@torch.no_grad()
def set_gains(model: nn.Module, values: dict[str, float]) -> None:
    """Start the gain of each named linear's norm at a value (all channels alike)."""
    for path, value in values.items():
        model.get_parameter(f"{path}.rms_norm.weight").fill_(value)


def set_strengths(model: nn.Module, weights: list[float], activations: list[float]) -> None:
    """Give every ternary module the λ of its decoder layer. Embeddings follow the first layer, the head the last."""
    layers = decoder_layers(model)
    assert len(weights) == len(activations) == len(layers), (len(weights), len(activations), len(layers))
    inside = {id(m): index for index, (_, layer) in enumerate(layers) for m in layer.modules()}
    for module in model.modules():
        if isinstance(module, TernaryModule):
            default = 0 if isinstance(module, TernaryEmbedding) else len(layers) - 1
            index = inside.get(id(module), default)
            module.set_strength(weights[index], activations[index])


def measure_rms(model: PreTrainedModel, paths: list[str], batches: Iterable[Tensor]) -> dict[str, float]:
    """Median over tokens of the RMS of each module's input. Returns {} if there are no batches.

    The median, because a few tokens have activations a thousand times the others', and a mean (let alone a mean square)
    would fit those: on SmolLM2-135M the norms then cost 1.9 nats (12.1) at step 0, with the median 1.3, with ones 13.0.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def hook(path: str):
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[path].append(inputs[0].detach().float().pow(2).mean(dim=-1).sqrt().flatten())

        return before

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        with evaluating(model):
            for batch in batches:
                model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(values).median().item() for path, values in seen.items() if values}


def _refuse_foreign_cover(model: PreTrainedModel, plan: Plan) -> None:
    """Raise ModelError if the embedding or head to be covered does more than its type says (Gemma scales its rows)."""
    for path, plain in ((plan.embedding, nn.Embedding), (plan.head, nn.Linear)):
        module = model.get_submodule(path) if path is not None else None
        if module is not None and type(module) is not plain:
            raise ModelError(
                f"{path} is a {type(module).__name__}, not a plain {plain.__name__}: making it ternary would drop what "
                "it adds. Use --cover projections."
            )


def _options(spec: TernarySpec, norm: Gain | None) -> dict[str, object]:
    return {
        "granularity": spec.scale, "int8_activations": spec.activations == "int8", "norm": norm, "eps": spec.eps,
        "dead_zone_bias": spec.dead_zone_bias, "learned_ranges": spec.learned_ranges,
    }  # fmt: skip


def _became(spec: TernarySpec, norm: Gain | None) -> str:
    learned = "learned " if spec.learned_ranges else ""
    parts = [f"ternary, {learned}scale per {spec.scale}", "int8 activations" if spec.activations == "int8" else "weights only"]
    return ", ".join(parts + (["own RMSNorm"] if norm else []))


def _partition(model: PreTrainedModel, plan: Plan, labels: dict[int, tuple[str, str]]) -> Surgery:
    """Count every parameter once, under the module that owns it first, and assert that the parts add up."""
    kept = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "lm_head"}
    counts: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            label = labels.get(id(module), (kept.get(id(module), "norm and other 1-D"), "kept in full precision"))
            entry = counts.setdefault(label, [0, 0])
            entry[0] += 1
            entry[1] += sum(p.numel() for p in own)
    total = sum(p.numel() for p in model.parameters())
    assert sum(entry[1] for entry in counts.values()) == total, (counts, total)
    found = sum(1 for module in model.modules() if isinstance(module, TernaryModule))
    planned = len(plan.linears) + (plan.embedding is not None) + (plan.head is not None)
    assert found == planned, (found, planned)
    return Surgery(plan, tuple(Row(*label, *entry) for label, entry in sorted(counts.items())), total)
