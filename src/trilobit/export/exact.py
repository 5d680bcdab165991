"""Has transformers in memory what was trained, to the last bit?

How far two readings of a model drift apart says little about a single wrong code. Where transformers keeps codes, scales and
gains as numbers that can be looked at (`autobitlinear`, packed, which it unpacks when it loads), each is compared. Biases are
stored divided by the scale, and gains that move (forms.py) are stored elsewhere: models with these are left to the comparison
of logits (verify.py). Gains that a form has moved already are moved back and again, two roundings away from what they were.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.errors import VerificationError
from trilobit.export.source import Source

TWO_ROUNDINGS = 2.0**-22  # relative


def is_comparable(source: Source, quantization: dict[str, Any]) -> bool:
    """Whether every stored number is the model's own. quantization: of the written config.json."""
    assert source.plan is not None
    kind = quantization.get("linear_class"), quantization.get("quantization_mode")
    normed = {linear.normed for linear in source.plan.linears.values()}
    biased = any(source.has_bias(path) for path in source.plan.linears)
    return kind == ("autobitlinear", "offline") and len(normed) == 1 and not biased


@torch.no_grad()
def require_exact(source: Source, other: PreTrainedModel) -> None:
    """Raise VerificationError naming the first tensor of transformers' model, loaded in fp32, that is not the source's."""
    assert source.plan is not None
    modules = dict(other.named_modules())
    for path, linear in source.plan.linears.items():
        theirs: Any = modules.get(path)
        packed = source.packed(path)
        _require_equal(f"{path}.weight", theirs.weight, packed.codes)
        _require_equal(f"{path}.weight_scale", theirs.weight_scale, packed.scale.reshape(1))
        if linear.normed:
            gain = source.gain(path)
            moved = source.plan.spec.placement == "output" and linear.fed_by is not None
            within = TWO_ROUNDINGS if moved else 0.0
            _require_equal(f"{path}.rms_norm.weight", theirs.rms_norm.weight, gain.expand(theirs.in_features), within)
    parameters = dict(other.named_parameters())
    for name in source.kept_names:
        _require_equal(name, parameters.get(name), source.kept(name))


def _require_equal(name: str, theirs: Tensor | None, ours: Tensor, within: float = 0.0) -> None:
    if (
        theirs is None
        or theirs.shape != ours.shape
        or not torch.allclose(theirs.float().cpu(), ours.float().cpu(), rtol=within, atol=0.0)
    ):
        raise VerificationError(
            f"transformers' {name} is not the model's, which is stored bit for bit. It was not left behind."
        )
