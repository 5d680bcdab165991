"""The modules of outlier-safe pre-training (Park et al., arXiv 2506.19697): what is added while training, folded after it.

    SSNorm     y = s · x / √(mean x² + ε)      one learnable s per norm, 1 at the start (the paper's γ is √D · s)
    EmbProj    y = x Pᵀ                        D × D, no bias, orthogonal at the start and unconstrained after it

A gain per channel lets a norm single out channels, and an embedding trained by Adam has outliers of its own; one scale
cannot, and a projection that Muon trains spreads them. Projections live inside the embedding and the head that they
follow and precede, as subclasses of nn.Embedding and nn.Linear: whoever asks for those, or decides by isinstance, still
finds them. Both fold into a stock model: E ← E Pᵀ, W ← W P, gain ← s repeated (surgery/fold.py).

Two norms in a row are one. With eps ε₁ before and ε₂ after, scales s and g, exactly:

    rms_norm(rms_norm(x, s, ε₁), g, ε₂) = rms_norm(x, g·s / √(s² + ε₂), ε₁·ε₂ / (s² + ε₂))

so a norm with a scalar gain in front of a ternary linear (arXiv 2505.08823), after a single-scale block norm, is a factor
on the weight scale. Letters: V vocabulary, D width.
"""

import torch
from torch import Tensor, nn

from trilobit import quant


class SingleScaleRMSNorm(nn.Module):
    """RMSNorm over the last dimension with one scale. `weight`: [1]. Any [..., K] → the same, in x's dtype."""

    def __init__(self, eps: float, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        _keep_from_transformers(self)

    def forward(self, x: Tensor) -> Tensor:
        return quant.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"one scale, eps={self.eps}"


class EmbeddingProjection(nn.Linear):
    """y = x Pᵀ, [..., D] → [..., D]. `weight` is P, a random orthogonal matrix at the start."""

    def __init__(self, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__(width, width, bias=False, device=device, dtype=dtype)
        _keep_from_transformers(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            self.weight.copy_(random_orthogonal(self.in_features))


class ProjectedEmbedding(nn.Embedding):
    """projection(scale · E[ids]), [...] → [..., D]: an embedding with its projection inside.

    scale: the constant that some families multiply their rows by (Gemma: √D). Under autocast the result keeps the dtype of
    E, as a plain embedding's does: it starts the residual stream.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.scale = scale
        self.projection = EmbeddingProjection(embedding_dim, device=device, dtype=dtype)
        _keep_from_transformers(self)

    @classmethod
    @torch.no_grad()
    def from_embedding(cls, embedding: nn.Embedding, rotation: Tensor, scale: float = 1.0) -> "ProjectedEmbedding":
        """Put `rotation` [D, D], orthogonal, behind an embedding, whose rows are turned back by it: the same function."""
        with torch.device("meta"):
            projected = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, scale=scale)
        weight = embedding.weight
        projected.weight = nn.Parameter(_times(weight, rotation))
        projected.projection.weight = nn.Parameter(rotation.to(weight))
        return projected.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return self.projection(rows if self.scale == 1 else rows * self.scale).to(rows.dtype)

    @torch.no_grad()
    def folded(self) -> Tensor:
        """The weight of the embedding without a projection that is the same function, as folded_embedding gives it."""
        return folded_embedding(self.weight, self.projection.weight)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", scale={self.scale}" if self.scale != 1 else "")


class ProjectedLinear(nn.Linear):
    """projection(x) Wᵀ + b, [..., D] → [..., V]: a language-model head with its projection inside."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.projection = EmbeddingProjection(in_features, device=device, dtype=dtype)
        _keep_from_transformers(self)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rotation: Tensor) -> "ProjectedLinear":
        """Put `rotation` [D, D], orthogonal, in front of a linear, whose weight is turned back by it: the same function."""
        with torch.device("meta"):
            projected = cls(linear.in_features, linear.out_features, linear.bias is not None)
        projected.weight = nn.Parameter(_times(linear.weight, rotation.T))
        projected.bias = linear.bias
        projected.projection.weight = nn.Parameter(rotation.to(linear.weight))
        return projected.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.projection(input))

    @torch.no_grad()
    def folded(self) -> Tensor:
        """The weight of the linear without a projection that is the same function, as folded_linear gives it."""
        return folded_linear(self.weight, self.projection.weight)


def folded_embedding(weight: Tensor, projection: Tensor) -> Tensor:
    """E Pᵀ, [V, D] float64, of E [V, D] and P [D, D]."""
    return weight.double() @ projection.double().T


def folded_linear(weight: Tensor, projection: Tensor) -> Tensor:
    """W P, [V, D] float64, of W [V, D] and P [D, D]."""
    return weight.double() @ projection.double()


def random_orthogonal(width: int, generator: torch.Generator | None = None) -> Tensor:
    """A random orthogonal matrix [width, width], float64 on the CPU: a seed means the same one on every device."""
    return nn.init.orthogonal_(torch.empty(width, width, dtype=torch.float64, device="cpu"), generator=generator)


def _times(weight: Tensor, rotation: Tensor) -> Tensor:
    """weight · rotation in fp32 (float64 for float64), in weight's dtype."""
    compute = quant.working_dtype(weight)
    return (weight.to(compute) @ rotation.to(weight.device, compute)).to(weight.dtype)


def _keep_from_transformers(module: nn.Module) -> None:
    # `init_weights` fills every nn.Linear, nn.Embedding and *RMSNorm* with its family's start, which for Gemma's norms is
    # zero, unless it finds this mark of its own.
    module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
