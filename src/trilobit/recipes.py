"""Named configurations of `trilobit tune`, as plain functions: what other people's recipes are in our words.

Flags override a recipe. Each says where it comes from and what could not be known.
"""

from collections.abc import Callable
from typing import Any


def paper() -> dict[str, Any]:
    """arXiv 2505.08823: a norm before every projection, gains at one, layer-wise schedule, cross-entropy.

    The schedule's staging is not published; ours is used.
    """
    return {"placement": "every", "gain_init": "ones", "schedule": "layerwise", "distill": "none"}


def autobitlinear() -> dict[str, Any]:
    """What transformers' AutoBitLinear does (the paper's reference code): norms at one, fully quantised from step 0."""
    return {"placement": "every", "gain_init": "ones", "schedule": "immediate", "distill": "none"}


def hf_blog() -> dict[str, Any]:
    """Hugging Face's 1.58-bit Llama 3: no norms, λ of weights and activations over the first fifth, lr 1e-4."""
    return {"placement": "none", "schedule": "global", "ramp_fraction": 0.2, "lr": 1e-4, "distill": "none"}


def distill() -> dict[str, Any]:
    """The baseline to be beaten: no norms, quantised from step 0, KL to the original model's logits."""
    return {"placement": "none", "schedule": "immediate", "distill": "logits"}


def weights_only() -> dict[str, Any]:
    """Ternary Bonsai's shape: groups of 128, no activation quantisation, embeddings and head ternary too, no norms."""
    return {"placement": "none", "activations": "none", "scale": "group-128", "cover": "+embeddings"}


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "paper": paper,
    "autobitlinear": autobitlinear,
    "hf-blog": hf_blog,
    "distill": distill,
    "weights-only": weights_only,
}
