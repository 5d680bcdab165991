"""Trainable ternary modules: drop-in replacements for nn.Linear and nn.Embedding with fp32 latent weights.

Their parameters keep the names of the module they replace (`weight`, `bias`), and the norm in front is `rms_norm.weight`,
the name transformers uses for it: exporting is then a pack, not a rename (arXiv 2505.08823; transformers' AutoBitLinear).
"""

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
    one gain per channel or (`"scalar"`) a single one. Starts at λ = 1.
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
        device: torch.device | str | None = None,
    ):
        assert norm in ("vector", "scalar", None), norm
        super().__init__(in_features, out_features, bias, device=device, dtype=torch.float32)
        self.rule = Rule(granularity, int8_activations, eps)
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
        return ternary

    def forward(self, input: Tensor) -> Tensor:
        gain = None if self.rms_norm is None else self.rms_norm.weight
        return ternary_linear(input, self.weight, self.bias, gain, self.rule, self.weight_strength, self.activation_strength)

    def extra_repr(self) -> str:
        activations = "int8" if self.rule.int8_activations else "full-precision"
        return f"{super().extra_repr()}, scale per {self.rule.granularity}, {activations} activations"


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


def ternary_modules(model: nn.Module) -> list[tuple[str, TernaryModule]]:
    """Every ternary module of `model` with its path, in module order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TernaryModule)]
