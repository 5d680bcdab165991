"""outlier_safe: the architecture of outlier-safe pre-training (arXiv 2506.19697) put into any decoder-only model.

    every RMSNorm (block, final, q/k)    → SingleScaleRMSNorm: one learnable scale
    embedding → layers → final norm → head    → embedding → P₁ → layers → final norm → P₂ → head, untied

Which modules are RMSNorms is found by running them. A leaf whose parameters are vectors is taken for a norm; a copy of it
with random weights has to compute

    y = (o + w) · x / √(mean x² + ε)        o = 0 (Llama) or 1 (Gemma), ε one of the module's own numbers

on rows from 10⁻⁴ to 10², and everything else that looks like a norm is refused. No logit changes: a norm whose gain is a
constant c starts at s = c, and embedding and head are turned back by the random P₁ and P₂ (a Gaussian matrix stays one).
`fold` (fold.py) undoes the surgery after training.
"""

import copy
import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trilobit import quant
from trilobit.errors import ConfigError, ModelError
from trilobit.nn.outlier_safe import (
    EmbeddingProjection,
    ProjectedEmbedding,
    ProjectedLinear,
    SingleScaleRMSNorm,
    random_orthogonal,
)
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.nn.ternary import TernaryModule
from trilobit.surgery.roles import PROBE_TOKENS, evaluating, vocabulary_size
from trilobit.surgery.ternary import Row, show_rows

TERNARY = (TernaryModule, PackedLinear, PackedEmbedding)
NOTICED = 1e-5  # of the largest logit: more than rounding, less than an encoder's answer to another token
ADDED: dict[type[nn.Module], tuple[str, str]] = {
    SingleScaleRMSNorm: ("RMSNorm", "one scale"),
    EmbeddingProjection: ("embedding projection", "orthogonal at the start"),
    ProjectedEmbedding: ("embedding", "projected"),
    ProjectedLinear: ("lm_head", "projected"),
}


@dataclass(frozen=True)
class OutlierSafeSpec:
    """Which parts `outlier_safe` put in. With the model's config it determines the architecture: see `apply_spec`."""

    ssnorm: bool = True
    embproj: bool = True


@dataclass(frozen=True)
class OutlierSafeSurgery:
    """The partition of a model's parameters by what became of their module. Adds up to `model.parameters()`."""

    spec: OutlierSafeSpec
    rows: tuple[Row, ...]
    parameters: int

    def __str__(self) -> str:
        return show_rows(self.rows, self.parameters)


@dataclass(frozen=True)
class NormRule:
    """How an RMSNorm applies its parameter: gain = offset + w, with `eps` under the root."""

    parameter: str
    offset: float
    eps: float


def outlier_safe(
    model: PreTrainedModel, *, ssnorm: bool = True, embproj: bool = True, tied: bool | None = None, seed: int = 0,
    runs: bool = True,
) -> OutlierSafeSurgery:  # fmt: skip
    """Give `model`, in place, single-scale norms and embedding projections; its logits stay what they were.

    tied: whether embedding and head share a weight afterwards; None leaves that alone, unless `embproj`, which unties
    them (`config.tie_word_embeddings` becomes False). seed: of the two projections. runs: false for a model whose layers have
    no weights yet, for which `require_causal` is to be called when they have. Returns the table of what became what,
    whose parts are asserted to add up to the model's parameters. Raises ConfigError for a tied head with projections, and
    ModelError, with nothing changed, for encoders, for models without a linear head, for norms that are not RMSNorms with
    a gain alone, and for norms that have learned different gains (they would be lost).
    """
    if tied and embproj:
        raise ConfigError("a tied head cannot have an embedding projection: embedding and head are folded with different ones.")
    _require_decoder(model)
    if runs:
        require_causal(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied and head.weight is not embedding.weight:  # pyright: ignore[reportOptionalMemberAccess]
        raise ModelError(f"the head of {type(model).__name__} has a weight of its own. Build it with tie_word_embeddings=True.")
    if embproj:
        embedding_scale(embedding)
    scales = {path: _constant_gain(model, path, rule) for path, rule in find_norms(model).items()} if ssnorm else {}
    if tied is False:
        untie(model)
    surgery = apply_spec(model, OutlierSafeSpec(ssnorm, embproj), seed=seed)
    with torch.no_grad():
        for path, scale in scales.items():
            model.get_parameter(f"{path}.weight").fill_(scale)
    return surgery


def apply_spec(model: PreTrainedModel, spec: OutlierSafeSpec, *, seed: int = 0) -> OutlierSafeSurgery:
    """The architecture alone, in place, every scale at one: for a stock model whose weights are loaded afterwards."""
    replacements: dict[nn.Module, nn.Module] = {}
    for path, rule in find_norms(model).items() if spec.ssnorm else ():
        norm = model.get_submodule(path)
        weight = norm.get_parameter(rule.parameter)
        new = SingleScaleRMSNorm(rule.eps, device=weight.device, dtype=weight.dtype)
        replacements[norm] = new.train(norm.training)
    if spec.embproj:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear), (type(embedding), type(head))
        generator = torch.Generator().manual_seed(seed)
        first = random_orthogonal(embedding.embedding_dim, generator)
        last = random_orthogonal(head.in_features, generator)
        replacements[embedding] = ProjectedEmbedding.from_embedding(embedding, first, embedding_scale(embedding))
        replacements[head] = ProjectedLinear.from_linear(head, last)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(path, replacements[module])
    if spec.embproj:
        untie(model)
    return _partition(model, spec, replacements)


def find_norms(model: nn.Module) -> dict[str, NormRule]:
    """Path and rule of every RMSNorm. Raises ModelError if there is none, or if another kind of norm is among them."""
    norms = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        vectors = all(p.ndim == 1 and p.numel() > 1 for p in own.values())
        named = "norm" in type(module).__name__.lower() and any(p.ndim > 1 for p in own.values())  # a gain for each head
        if not own or list(module.children()) or not (vectors or named):
            continue
        rule = probe_norm(module)
        if rule is None:
            held = " and ".join(f"{name} {tuple(p.shape)}" for name, p in own.items())
            raise ModelError(
                f"{path} is a {type(module).__name__} with {held}, and does not compute an RMSNorm with a gain alone: a "
                "single scale cannot stand for it. Do without single-scale norms (--no-ssnorm), or take another architecture."
            )
        norms[path] = rule
    if not norms:
        seen = sorted({type(module).__name__ for module in model.modules() if "norm" in type(module).__name__.lower()})
        raise ModelError(
            f"{type(model).__name__} has no RMSNorm with a gain that could become a single scale: its norms are "
            f"{' and '.join(seen) or 'none'}. Do without single-scale norms (--no-ssnorm), or take another architecture."
        )
    return norms


def probe_norm(module: nn.Module) -> NormRule | None:
    """How `module` applies its parameter if it computes an RMSNorm of one argument; None if it computes anything else."""
    own = dict(module.named_parameters())
    if len(own) != 1 or len(inspect.signature(module.forward).parameters) != 1:
        return None
    ((name, parameter),) = own.items()
    if parameter.ndim != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(parameter.shape, generator=generator) + 0.5
    x = torch.randn(1, 7, weight.numel(), generator=generator) * torch.logspace(-4, 2, 7)[:, None]
    probed = copy.deepcopy(module, {id(parameter): nn.Parameter(weight)}).eval()
    try:
        with torch.no_grad():
            y = probed(x)
    except Exception:  # whatever it needs, a tensor [B, T, D] is not enough for it
        return None
    numbers = [value for value in vars(module).values() if isinstance(value, float)]
    for eps, offset in product(numbers, (0.0, 1.0)):
        expected = quant.rms_norm(x.double(), offset + weight.double(), eps)
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y.double(), expected, rtol=1e-5, atol=0):
            return NormRule(name, offset, eps)
    return None


def embedding_scale(embedding: nn.Module | None) -> float:
    """The constant an embedding multiplies its rows by. Raises ModelError if it does anything else to them."""
    assert isinstance(embedding, nn.Embedding), type(embedding)
    rows = torch.randn(8, embedding.embedding_dim, generator=torch.Generator().manual_seed(0))
    rows[0] = 1
    probed = copy.deepcopy(embedding, {id(embedding.weight): nn.Parameter(rows)}).cpu()
    probed.padding_idx = None
    with torch.no_grad():
        y = probed(torch.arange(8))
    scale = y[0, 0].item()
    if not torch.allclose(y, rows * scale, rtol=1e-5):
        raise ModelError(f"the embedding is a {type(embedding).__name__}, which does more than scale its rows.")
    return scale


@torch.no_grad()
def _constant_gain(model: nn.Module, path: str, rule: NormRule) -> float:
    gain = rule.offset + model.get_submodule(path).get_parameter(rule.parameter).double()
    low, high = gain.min().item(), gain.max().item()
    if low != high:
        raise ModelError(
            f"{path} has learned a gain per channel ({low:.3g} to {high:.3g}), which a single scale would lose: outlier-safe "
            "training starts from a fresh model."
        )
    return low


def _require_decoder(model: PreTrainedModel) -> None:
    """Raise ModelError unless `model` is a causal language model with an embedding and a linear head, untouched so far."""
    kind = type(model).__name__
    for module in model.modules():
        if isinstance(module, (*TERNARY, *ADDED)):
            raise ModelError(f"{kind} has a {type(module).__name__} already: outlier-safe surgery comes first, and once.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{kind} is a quantised checkpoint. Build a fresh model from its config.")
    if getattr(model.config, "is_encoder_decoder", False) or not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise ModelError(f"{kind} is not a decoder-only text model.")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ModelError(f"{kind} has no linear language-model head (its head is a {type(head).__name__}).")


def require_causal(model: PreTrainedModel) -> None:
    """Raise ModelError unless the logits of `model` are finite and do not depend on later tokens. Of a model in parts every
    rank has to ask."""
    kind = type(model).__name__
    vocabulary, generator = vocabulary_size(model), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    broken: list[str] = []

    def look(path: str, output: Any) -> None:
        if not (output if isinstance(output, Tensor) else output[0]).isfinite().all():
            broken.append(path)

    handles = [
        layer.register_forward_hook(lambda module, inputs, output, path=path: look(path, output))
        for path, layer in model.named_modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    try:
        with evaluating(model):
            before, after = (model(input_ids=ids, use_cache=False).logits for ids in (tokens, other))
    finally:
        for handle in handles:
            handle.remove()
    if not before.isfinite().all():
        where = f"what {broken[0]} passes on" if broken else "the head"
        raise ModelError(f"{kind} gives logits that are not finite, first in {where}: its weights are damaged.")
    # Experts multiply as many tokens as are routed to them, which changes the last bits of the others.
    if (before - after)[:, :-1].abs().max() > NOTICED * before.abs().max():
        raise ModelError(f"{kind} is not causal (an encoder?): earlier positions see later tokens.")


def untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own if it has none, and let transformers know, which would tie them again otherwise."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:  # pyright: ignore[reportOptionalMemberAccess]
        head.weight = nn.Parameter(head.weight.detach().clone())  # pyright: ignore
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _partition(model: PreTrainedModel, spec: OutlierSafeSpec, new: dict[nn.Module, nn.Module]) -> OutlierSafeSurgery:
    """Count every parameter once, under the module that owns it first, and assert that the parts add up."""
    ends = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "lm_head"}
    counts: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            kind = "linear" if isinstance(module, nn.Linear) else "other"
            label = (ends.get(id(module), kind), "kept")
            label = next((became for added, became in ADDED.items() if isinstance(module, added)), label)
            entry = counts.setdefault(label, [0, 0])
            entry[0] += 1
            entry[1] += sum(p.numel() for p in own)
    total = sum(p.numel() for p in model.parameters())
    assert sum(entry[1] for entry in counts.values()) == total, (counts, total)
    planned = len(new) - 2 * spec.embproj, 2 * spec.embproj
    found = tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in (SingleScaleRMSNorm, EmbeddingProjection))
    assert found == planned, (found, planned)
    return OutlierSafeSurgery(spec, tuple(Row(*label, *entry) for label, entry in sorted(counts.items())), total)
