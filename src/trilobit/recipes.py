"""Named configurations of `trilobit tune` and `trilobit pretrain`, as plain functions: other people's recipes in our words.

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
    """What transformers' AutoBitLinear does (the paper's reference code): norms at one, fully quantised from step 0.

    From its code: absmean and absmax, straight-through gradients, RMSNorm inside the linear. It is a class, not a way of
    training: rate, batches and length are whatever the run has.
    """
    return {"placement": "every", "gain_init": "ones", "schedule": "immediate", "distill": "none"}


def hf_blog() -> dict[str, Any]:
    """Hugging Face's 1.58-bit Llama 3: no norms, λ of weights and activations over the first fifth, lr 1e-4.

    From the post: its λ code, which has no norm, and the rate (for 8 B parameters and batches of 2 M tokens: choose --lr for
    smaller ones). The post's training class normalises its input first. Not known: whether the model they tuned did, and how
    the rate fell.
    """
    return {"placement": "none", "schedule": "global", "ramp_fraction": 0.2, "lr": 1e-4, "distill": "none"}


def distill() -> dict[str, Any]:
    """The baseline to be beaten: no norms, quantised from step 0, KL to the original model's logits at T = 1.

    Nobody's in particular: what distillation pipelines have in common, without their further losses (`bitdistill` has some).
    """
    return {"placement": "none", "schedule": "immediate", "distill": "logits"}


def weights_only() -> dict[str, Any]:
    """Ternary Bonsai's shape: groups of 128, no activation quantisation, embeddings and head ternary too, no norms.

    How it is trained is not published: here as everything else is, λ rising in all layers at once, from the original's logits.
    """
    return {"placement": "none", "activations": "none", "scale": "group-128", "cover": "+embeddings"}


def tequila() -> dict[str, Any]:
    """arXiv 2509.23809: weights only in groups of 128, quantised at once, dead-zone weights as a bias with ε = 1e-3.

    From the authors' code: absmean scale and threshold, straight-through gradient, ε and group size of their 1 B run, lr
    1e-3 with warm-up over 61 % of it. Not known: which of their several variants the paper's tables used.
    """
    return {
        "placement": "none", "activations": "none", "scale": "group-128", "schedule": "immediate", "dead_zone_bias": 1e-3,
        "distill": "none",
    }  # fmt: skip


def paretoq() -> dict[str, Any]:
    """arXiv 2502.02631: weights only, a learned range per row that starts at the row's largest weight, quantised at once.

    Their 30 B tokens at lr 2e-5 are not a setting for smaller budgets: choose --lr. Not known: whether their loss had a
    teacher; here it has none.
    """
    return {
        "placement": "none", "activations": "none", "scale": "row", "schedule": "immediate", "learned_ranges": True,
        "distill": "none",
    }  # fmt: skip


def bitdistill() -> dict[str, Any]:
    """arXiv 2510.13998: norms before attention and MLP output, cross-entropy + 10 · KL at T = 5 + 1e5 · relations.

    From the paper: the three losses, their constants, where norms go, quantised at once. Our losses are weighted w and
    1 − w and KL is times T²: w = 2/7 is their 10, all divided by 1.4. Not known: whether theirs was times T², the layer,
    the heads of the relations, how 1e5 was meant to be normalised, how norms begin (here calibrated). Their continued
    pre-training is this run itself.
    """
    return {
        "placement": "output", "schedule": "immediate", "distill": "logits", "distill_weight": 2 / 7, "temperature": 5.0,
        "distill_attention": 1e5 / 1.4,
    }  # fmt: skip


def bitdistill_normalised() -> dict[str, Any]:
    """bitdistill with losses of one size: cross-entropy and KL at T = 1 halved, relations with weight 1."""
    return bitdistill() | {"distill_weight": 0.5, "temperature": 1.0, "distill_attention": 1.0}


def adam() -> dict[str, Any]:
    """First row of outlier-safe pre-training's ablation (arXiv 2506.19697): AdamW, ordinary norms, no projections."""
    return {"optimizer": "adamw", "ssnorm": False, "embproj": False}


def muon_only() -> dict[str, Any]:
    """Second row: Muon for every matrix, embedding and head among them. The authors' Muon has a step for vectors as well,
    g/‖g‖ · 0.2·√length; here gains stay on AdamW."""
    return {"optimizer": "muon", "muon_embeddings": True, "ssnorm": False, "embproj": False}


def muon() -> dict[str, Any]:
    """Third row: Muon, embedding and head on AdamW."""
    return {"optimizer": "muon", "ssnorm": False, "embproj": False}


def ssnorm() -> dict[str, Any]:
    """Fourth row: Muon and single-scale norms."""
    return {"optimizer": "muon", "ssnorm": True, "embproj": False}


def embproj() -> dict[str, Any]:
    """Fifth row: Muon and embedding projections."""
    return {"optimizer": "muon", "ssnorm": False, "embproj": True}


def osp() -> dict[str, Any]:
    """The last row, and the default: all three. lr 5e-4 and weight decay 0.01 are the authors' example; their 1.4 B model saw
    1 T tokens in sequences of 2,048. Not known: their warm-up and decay fractions, and which optimizer trains the scales."""
    return {"optimizer": "muon", "ssnorm": True, "embproj": True}


def _osp_of(architecture: str, **settings: Any) -> Callable[[], dict[str, Any]]:
    def recipe() -> dict[str, Any]:
        return osp() | {"architecture": architecture, **settings}

    recipe.__doc__ = f"Outlier-safe pre-training of {architecture}."
    return recipe


RECIPES: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "tune": {
        "paper": paper,
        "autobitlinear": autobitlinear,
        "hf-blog": hf_blog,
        "distill": distill,
        "weights-only": weights_only,
        "tequila": tequila,
        "paretoq": paretoq,
        "bitdistill": bitdistill,
        "bitdistill-normalised": bitdistill_normalised,
    },
    "pretrain": {
        "adam": adam,
        "muon-only": muon_only,
        "muon": muon,
        "ssnorm": ssnorm,
        "embproj": embproj,
        "osp": osp,
        "osp-3m": _osp_of("llama-3m", train_tokenizer=4096),
        "osp-60m": _osp_of("llama-60m", batch_tokens=65_536, sequence_length=1024),
        "osp-135m": _osp_of("llama-135m", batch_tokens=65_536, sequence_length=1024),
        "osp-1.4b": _osp_of("llama-1.4b", lr=5e-4, batch_tokens=1_048_576, sequence_length=2048),
    },
}
"""By command. osp-SIZE is outlier-safe pre-training of one of our Llamas; 1.4b is the paper's own."""
