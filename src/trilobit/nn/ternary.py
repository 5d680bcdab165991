"""Trainable ternary modules: drop-in replacements for nn.Linear and nn.Embedding with fp32 latent weights.

Their parameters keep the names of the module they replace (`weight`, `bias`), and the norm in front is `rms_norm.weight`,
the name transformers uses for it: exporting is then a pack, not a rename (arXiv 2505.08823; transformers' AutoBitLinear).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trilobit import quant
from trilobit.kernels.ternary_linear import Rule, Strength, ternary_linear
from trilobit.quant import Granularity


class InputRMSNorm(nn.Module):
    """The learnable RMSNorm in front of a ternary linear. `weight` is the gain: [K] (vector) or [1] (scalar)."""

    def __init__(self, features: int, *, scalar: bool = False, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1 if scalar else features))

    def forward(self, x: Tensor) -> Tensor:
        return quant.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class TernaryModule(nn.Module):
    """What a schedule sees: a module with a quantisation strength λ for its weights and one for its activations."""

    weight_strength: Strength
    activation_strength: Strength

    def set_strength(self, weights: float, activations: float) -> None:
        """Set λ_w and λ_a, each in [0, 1]. Ends of the range are exact: 0 is full precision, 1 fully quantised."""
        assert 0 <= weights <= 1 and 0 <= activations <= 1, (weights, activations)
        self.weight_strength = self._as_strength("weights", weights)
        self.activation_strength = self._as_strength("activations", activations)

    def _as_strength(self, which: str, value: float) -> Strength:
        # Strictly between 0 and 1 the value lives in a tensor that is overwritten in place: a compiled step sees
        # three states (off, blending, on), not a new constant at every step.
        if value in (0, 1):
            return float(value)
        name = f"_blending_{which}"
        parameter = next(self.parameters())
        tensor = getattr(self, name, None)
        if tensor is None or tensor.device != parameter.device:
            tensor = torch.zeros((), dtype=quant.working_dtype(parameter), device=parameter.device)
            object.__setattr__(self, name, tensor)
        return tensor.fill_(value)


class TernaryLinear(nn.Linear, TernaryModule):
    """y = Q_λ(rms_norm(x)) · Q_λ(W)ᵀ + b with a straight-through gradient to the latent W.

    Shapes as nn.Linear: [..., in_features] → [..., out_features]. `granularity` is that of quant.absmean_scale;
    `int8_activations=False` quantises weights only; `norm` adds a learnable RMSNorm of the module's own in front, with
    one gain per channel or (`"scalar"`) a single one. Other people's quantisers: `dead_zone_bias` is Tequila's ε
    (quant.dead_zone_sum), `learned_ranges` ParetoQ's (quant.learned_quantize; granularity "row"). Starts at λ = 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: Granularity = "tensor",
        int8_activations: bool = True,
        norm: str | None = "vector",
        eps: float = 1e-6,
        dead_zone_bias: float = 0.0,
        learned_ranges: bool = False,
        device: torch.device | str | None = None,
    ):
        assert norm in ("vector", "scalar", None), norm
        assert not learned_ranges or granularity == "row", granularity
        super().__init__(in_features, out_features, bias, device=device, dtype=torch.float32)
        self.rule = Rule(granularity, int8_activations, eps)
        self.dead_zone_bias = dead_zone_bias
        self.ranges = nn.Parameter(torch.ones(out_features, 1, device=device)) if learned_ranges else None
        self.kept: tuple[Tensor, Tensor] | None = None  # codes and scale inside kept_codes
        self.rms_norm = None
        if norm is not None:
            self.rms_norm = InputRMSNorm(in_features, scalar=norm == "scalar", eps=eps).to(device)
        self.set_strength(1.0, 1.0)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: object) -> "TernaryLinear":
        """Wrap an existing linear: its weight and bias become fp32 latents (fp32 tensors are shared, not copied)."""
        with torch.device("meta"):
            ternary = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)  # pyright: ignore
        if ternary.rms_norm is not None:
            ternary.rms_norm.weight = nn.Parameter(torch.ones(ternary.rms_norm.weight.shape, device=linear.weight.device))
        ternary.weight = nn.Parameter(linear.weight.detach().float())
        if linear.bias is not None:
            ternary.bias = nn.Parameter(linear.bias.detach().float())
        if ternary.ranges is not None:  # they start at each row's largest weight
            ternary.ranges = nn.Parameter(linear.weight.detach().float().abs().amax(dim=1, keepdim=True))
        return ternary

    def forward(self, input: Tensor) -> Tensor:
        gain = None if self.rms_norm is None else self.rms_norm.weight
        weight, strength = self.weight, self.weight_strength
        if self.ranges is not None:
            faded = _mix(weight, quant.learned_quantize(weight, self.ranges), strength)
            weight, strength = faded, 0.0  # what follows multiplies by it as it is
        bias = self.total_bias(self.weight_strength)
        return ternary_linear(input, weight, bias, gain, self.rule, strength, self.activation_strength, self.kept)

    def total_bias(self, strength: Strength = 1.0) -> Tensor | None:
        """The bias, [O], with what the dead zone adds to it at a strength; None if there is neither."""
        if self.dead_zone_bias == 0 or (not isinstance(strength, Tensor) and strength == 0):
            return self.bias
        added = quant.dead_zone_sum(self.weight, self.rule.granularity) * (strength * self.dead_zone_bias)
        return added if self.bias is None else self.bias + added

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, Tensor]:
        """Codes [O, K] int8 and scale (as quant.absmean_scale) of the latent weight."""
        granularity = self.rule.granularity
        scale = quant.absmean_scale(self.weight, granularity) if self.ranges is None else quant.learned_scale(self.ranges)
        return quant.ternary_codes(self.weight, scale, granularity), scale

    def extra_repr(self) -> str:
        activations = "int8" if self.rule.int8_activations else "full-precision"
        return f"{super().extra_repr()}, scale per {self.rule.granularity}, {activations} activations"


def _mix(x: Tensor, quantized: Tensor, strength: Strength) -> Tensor:
    """x + λ (Q − x) with both gradients; the ends are exact."""
    if isinstance(strength, Tensor):
        return torch.lerp(x, quantized, strength)
    return quantized if strength == 1 else x


class TernaryEmbedding(nn.Embedding, TernaryModule):
    """Rows of Q_λ(W), quantised after the look-up where the granule allows it. Shapes as nn.Embedding."""

    granularity: Granularity

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, granularity: Granularity) -> "TernaryEmbedding":
        with torch.device("meta"):
            ternary = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        ternary.weight = nn.Parameter(embedding.weight.detach().float())
        ternary.granularity = granularity
        ternary.set_strength(1.0, 1.0)
        return ternary

    def forward(self, input: Tensor) -> Tensor:
        rows = nn.functional.embedding(input.flatten(), self.weight, self.padding_idx)
        if not isinstance(self.weight_strength, Tensor) and self.weight_strength == 0:
            return rows.view(*input.shape, -1)
        source = self.weight if self.granularity == "tensor" else rows
        scale = quant.absmean_scale(source, self.granularity)
        codes = quant.ternary_codes(rows, scale, self.granularity)
        quantized = quant.ternary_dequantize(codes, scale, self.granularity)
        return quant.fade(rows, quantized, self.weight_strength).view(*input.shape, -1)


@contextmanager
def kept_codes(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of ternary linears at λ_w = 1 do not change, and are quantised once, at the beginning: for the
    micro-batches of one step. Costs a byte a weight until the end. Weights that are sharded over ranks (DTensor) and learned
    ranges are quantised at every use, as outside."""
    linears = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    chosen = [m for m in linears if m.ranges is None and _is_one(m.weight_strength) and not hasattr(m.weight, "device_mesh")]
    for linear in chosen:
        linear.kept = linear.quantized()
    try:
        yield
    finally:
        for linear in chosen:
            linear.kept = None


def _is_one(strength: Strength) -> bool:
    return not isinstance(strength, Tensor) and strength == 1


def ternary_modules(model: nn.Module) -> list[tuple[str, TernaryModule]]:
    """Every ternary module of `model` with its path, in module order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TernaryModule)]
