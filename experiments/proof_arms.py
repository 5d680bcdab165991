"""The arms of the proof study: what is compared, as settings of `trilobit tune`.

Not a cube. A star around the two ends of the question (no norm, quantised at once · norms everywhere, layer by layer):
placement × schedule × {cross-entropy, KL} in full, with what else is claimed to matter varied at those ends; then scale,
activations, cover and gain; then other people's recipes as they define them.
"""

from typing import Any

from trilobit.recipes import RECIPES as ALL_RECIPES

Settings = dict[str, Any]
RECIPES = ALL_RECIPES["tune"]

CE: Settings = {"distill": "none"}
KL: Settings = {"distill": "logits"}
MIX: Settings = {"distill": "logits", "distill_weight": 0.5}
EVERY: Settings = {"placement": "every", "gain_init": "calibrated"}
NONE: Settings = {"placement": "none"}


def _star() -> dict[str, Settings]:
    arms: dict[str, Settings] = {}
    for placement in ("none", "output", "every"):
        for schedule in ("immediate", "global", "layerwise"):
            for loss, settings in (("ce", CE), ("kl", KL)):
                arms[f"{placement}-{schedule}-{loss}"] = {"placement": placement, "schedule": schedule, **settings}
    for placement in ("output", "every"):
        for schedule in ("immediate", "layerwise"):
            arms[f"{placement}-ones-{schedule}-ce"] = {"placement": placement, "gain_init": "ones", "schedule": schedule, **CE}
    for loss, settings in (("ce", CE), ("kl", KL)):
        arms[f"every-reverse-{loss}"] = {**EVERY, "schedule": "layerwise-reverse", **settings}
    for schedule in ("immediate", "layerwise"):
        arms[f"none-{schedule}-mix"] = {**NONE, "schedule": schedule, **MIX}
        arms[f"every-{schedule}-mix"] = {**EVERY, "schedule": schedule, **MIX}
    return arms


def _around() -> dict[str, Settings]:
    """One setting changed, at either end."""
    ends = {"every": {**EVERY, "schedule": "layerwise", **CE}, "none": {**NONE, "schedule": "immediate", **CE}}
    arms: dict[str, Settings] = {}
    for end, settings in ends.items():
        for scale in ("row", "group-64", "group-128"):
            arms[f"{end}-{scale}"] = {**settings, "scale": scale}
        arms[f"{end}-weights-only"] = {**settings, "activations": "none"}
        arms[f"{end}-embeddings"] = {**settings, "cover": "+embeddings"}
    arms["every-scalar"] = {**ends["every"], "gain": "scalar"}
    return arms


def _beyond() -> dict[str, Settings]:
    """What neither paper says: other ramps and rates around the end with norms and a teacher."""
    start: Settings = {**EVERY, "schedule": "layerwise", **KL}
    ours: Settings = {**EVERY, "schedule": "global", **KL}  # `trilobit tune` without flags
    groups: Settings = {"scale": "group-128", "activations": "none"}
    return {
        "every-kl-short-ramp": {**start, "ramp_fraction": 0.1}, "every-kl-long-ramp": {**start, "ramp_fraction": 0.5},
        "every-kl-late-activations": {**start, "activation_schedule": "global", "activation_ramp_fraction": 0.5},
        "every-kl-wsd": {**start, "decay": "wsd", "decay_fraction": 0.5},
        "none-kl-wsd": {**NONE, "schedule": "immediate", **KL, "decay": "wsd", "decay_fraction": 0.5},
        "every-global-kl-wsd": {**start, "schedule": "global", "decay": "wsd", "decay_fraction": 0.5},
        "none-global-kl-hidden": {**NONE, "schedule": "global", **KL, "distill_hidden": 1.0},
        "every-global-kl-hidden": {**EVERY, "schedule": "global", **KL, "distill_hidden": 1.0},
        "none-global-kl-row": {**NONE, "schedule": "global", **KL, "scale": "row"},
        "every-global-kl-row": {**EVERY, "schedule": "global", **KL, "scale": "row"},
        "none-immediate-kl-row": {**NONE, "schedule": "immediate", **KL, "scale": "row"},
        "none-global-kl-long-ramp": {**NONE, "schedule": "global", **KL, "ramp_fraction": 0.5},
        "every-global-kl-scalar": {**ours, "gain": "scalar"}, "every-global-kl-group-128": {**ours, "scale": "group-128"},
        "every-global-kl-group-64": {**ours, "scale": "group-64"},
        "every-global-kl-weights-only": {**ours, "activations": "none"},
        "every-global-kl-embeddings": {**ours, "cover": "+embeddings"},
        "every-global-kl-short-ramp": {**ours, "ramp_fraction": 0.1},
        "every-global-kl-long-ramp": {**ours, "ramp_fraction": 0.5},
        "every-global-kl-late-activations": {**ours, "activation_schedule": "global", "activation_ramp_fraction": 0.5},
        "every-global-kl-then-decay": {**ours, "decay": "wsd", "decay_fraction": 0.75},  # the rate falls when λ is 1
        "every-global-kl-weight-decay": {**ours, "weight_decay": 0.1},  # draws latents to the threshold, where they flip
        "every-global-kl-soft": {**ours, "temperature": 2.0}, "every-global-mix": {**ours, **MIX},
        "every-global-kl-muon": {**ours, "optimizer": "muon"},
        **{
            f"every-global-kl-windows-{length}": {**ours, "sequence_length": length, "sequences": 1024 // length}
            for length in (32, 64, 128, 256, 512)
        },
        "every-kl-sensitivity": {**start, "schedule": "sensitivity"},
        "every-kl-muon": {**start, "optimizer": "muon"},
        "none-kl-muon": {**NONE, "schedule": "global", **KL, "optimizer": "muon"},
        "every-group-128-weights-only-kl": {**start, **groups},
        "none-group-128-weights-only-kl": {**NONE, "schedule": "layerwise", **KL, **groups},
        "none-group-128-weights-only-global-kl": {**NONE, "schedule": "global", **KL, **groups},
    }  # fmt: skip


def _warm() -> dict[str, Settings]:
    """Reconstructed layer by layer first, on an eighth of the budget (the runner sets it); then as the arm of that name."""
    start: Settings = {"reconstruct_tokens": 32_768, "schedule": "immediate"}
    return {
        "warm-every-ce": {**EVERY, **start, **CE}, "warm-every-kl": {**EVERY, **start, **KL},
        "warm-none-ce": {**NONE, **start, **CE}, "warm-none-kl": {**NONE, **start, **KL},
    }  # fmt: skip


ARMS: dict[str, Settings] = {
    "full-precision": {"schedule": "never"},
    **_star(),
    **_around(),
    **_beyond(),
    **_warm(),
    "recipe-hf-blog": RECIPES["hf-blog"](),
    "recipe-weights-only": {**RECIPES["weights-only"](), "schedule": "layerwise", **CE},
    "recipe-weights-only-kl": RECIPES["weights-only"](),
    **{f"recipe-{name}": RECIPES[name]() for name in ("tequila", "paretoq", "bitdistill", "bitdistill-normalised")},
}
CONTROL = "full-precision"
"""Fine-tuned equally, never quantised: what the text alone is worth."""

ALWAYS = (
    CONTROL, "none-immediate-ce", "every-ones-immediate-ce", "none-immediate-kl", "recipe-hf-blog", "every-layerwise-ce",
    "every-ones-layerwise-ce",
)  # fmt: skip
"""Arms that claims are made against: they go through every budget. every-ones-immediate-ce is AutoBitLinear's way."""
