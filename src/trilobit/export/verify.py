"""Is what was written what was trained? The artefact is loaded by its real consumer and compared position by position.

Whole models are compared by argmax, mean |Δ logit|, KL and perplexity, not by the largest difference: norms and softmax
are summed in another order elsewhere, and one flipped int8 code moves a single logit visibly.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trilobit.errors import VerificationError
from trilobit.infer.load import quiet_transformers
from trilobit.measure.perplexity import perplexity

POSITIONS = 8192  # at 1,000 the perplexity of small models would move by most of its limit from int8 flips alone
MIN_TOP1 = 0.985
MAX_PERPLEXITY_CHANGE = 0.001


@dataclass(frozen=True)
class Agreement:
    """How a consumer's logits compare with the trained model's. kl in nats per position, perplexity_ratio theirs / ours."""

    positions: int
    top1: float
    mean_difference: float
    kl: float
    perplexity_ratio: float

    def require(self, what: str) -> None:
        """Raise VerificationError outside the limits."""
        if not (self.top1 >= MIN_TOP1 and abs(self.perplexity_ratio - 1) <= MAX_PERPLEXITY_CHANGE):
            raise VerificationError(
                f"{what} differs from the trained model: same argmax at {self.top1:.2%} of {self.positions} positions "
                f"(limit {MIN_TOP1:.1%}), perplexity × {self.perplexity_ratio:.5f}. It was not left behind."
            )


@torch.no_grad()
def compare(reference: nn.Module, other: nn.Module, windows: Tensor, positions: int = POSITIONS) -> Agreement:
    """Compare logits in fp32 on the first `positions` of token windows [N, W + 1], both models on the reference's device."""
    device = next(reference.parameters()).device
    other.to(device)
    agree = difference = divergence = ours = theirs = 0.0
    seen = 0
    for window in windows:
        if seen >= positions:
            break
        inputs, targets = window[None, :-1].to(device), window[1:].to(device)
        with torch.autocast(device.type, enabled=False):
            a = reference(input_ids=inputs, use_cache=False).logits[0].float()
        with torch.compiler.set_stance("force_eager"):  # transformers' bitnet classes would want a C++ compiler
            b = other(input_ids=inputs, use_cache=False).logits[0].float()
        a, b, targets = a[: positions - seen], b[: positions - seen], targets[: positions - seen]
        p, q = F.log_softmax(a, dim=-1), F.log_softmax(b, dim=-1)
        agree += (a.argmax(-1) == b.argmax(-1)).sum().item()
        difference += (a - b).abs().mean(-1).sum().item()
        divergence += (p.exp() * (p - q)).sum(-1).sum().item()
        ours += F.nll_loss(p, targets, reduction="sum").item()
        theirs += F.nll_loss(q, targets, reduction="sum").item()
        seen += len(a)
    assert seen > 0, "no positions to compare"
    ratio = perplexity((theirs - ours) / seen)
    return Agreement(seen, agree / seen, difference / seen, divergence / seen, ratio)


def load_stock(directory: Path) -> PreTrainedModel:
    """Load with transformers alone, in fp32, as a user would; VerificationError if it reports odd weights."""
    try:
        with quiet_transformers(), torch.compiler.set_stance("force_eager"):
            model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                directory, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # whatever it is, what was written is not what it reads
        raise VerificationError(f"transformers cannot load what was written: {error} It was not left behind.") from error
    odd = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    if odd:
        raise VerificationError(f"transformers finds fault with {directory.name}: {odd}. It was not left behind.")
    return model.eval()
