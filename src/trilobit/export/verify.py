"""Is what was written what was trained? The artefact is loaded by its real consumer and compared position by position.

Whole models are compared by argmax, mean |Δ logit|, KL and perplexity, not by the largest difference: norms and softmax
are summed in another order elsewhere, and one flipped int8 code moves a single logit visibly.

In a deep model flips breed flips: a difference in the last bit of one sum is, thirty layers on, as large as int8 rounding
itself, whoever computes it (SmolLM2-135M after 1 M tokens: another argmax at 8 % of the positions). Such a model does not
agree with itself to the usual limits. Where they fail, the consumer is therefore held to the model's own noise floor: how
far it moves when its embeddings change by one part in four million, the last bits of an fp32 number.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trilobit.errors import VerificationError
from trilobit.infer.quiet import quiet_transformers
from trilobit.measure.perplexity import perplexity
from trilobit.surgery.roles import evaluating

POSITIONS = 8192  # at 1,000 the perplexity of small models would move by most of its limit from int8 flips alone
MIN_TOP1 = 0.985
MAX_PERPLEXITY_CHANGE = 0.001
LAST_BITS = 2.0**-22
# Beyond the noise floor, which is a sample of noise itself:
FLOOR_TOP1 = 0.01
FLOOR_KL = 1.5
FLOOR_ERRORS = 3.0


@dataclass(frozen=True)
class Agreement:
    """How a consumer's logits compare with the trained model's. kl in nats per position, perplexity_ratio theirs / ours;
    nats_error is the standard error of the mean difference in nats, floor_top1 and floor_kl the model's own noise floor
    where it was asked for."""

    positions: int
    top1: float
    mean_difference: float
    kl: float
    perplexity_ratio: float
    nats_error: float = 0.0
    floor_top1: float | None = None
    floor_kl: float | None = None

    def require(self, what: str, floor: Callable[[], "Agreement"] | None = None) -> "Agreement":
        """Itself, if it is within the limits, or no further off than `floor`, the model's agreement with itself (then with
        the floor noted). Raises VerificationError otherwise."""
        change = abs(math.log(self.perplexity_ratio)) if self.perplexity_ratio > 0 else math.inf
        if self.top1 >= MIN_TOP1 and change <= MAX_PERPLEXITY_CHANGE:
            return self
        said = ""
        if floor is not None and math.isfinite(self.kl):
            own = floor()
            if (
                self.top1 >= own.top1 - FLOOR_TOP1
                and self.kl <= FLOOR_KL * own.kl
                and change <= MAX_PERPLEXITY_CHANGE + FLOOR_ERRORS * self.nats_error
            ):
                return replace(self, floor_top1=own.top1, floor_kl=own.kl)
            said = f"; the model's own noise: {own.top1:.2%}, KL {own.kl:.5f}, here {self.kl:.5f}"
        raise VerificationError(
            f"{what} differs from the trained model: same argmax at {self.top1:.2%} of {self.positions} positions "
            f"(limit {MIN_TOP1:.1%}), perplexity × {self.perplexity_ratio:.5f}{said}. It was not left behind."
        )


def in_words(agreement: Mapping[str, float | None]) -> str:
    """What was compared, and what came of it, of an Agreement as a dictionary."""
    if not agreement:
        return "nothing was compared"
    text = (
        f"model/, loaded back as its users load it, has the same likeliest token as what was trained at "
        f"{agreement['top1']:.2%} of {agreement['positions']:,} places in held-out text; its perplexity there is "
        f"× {agreement['perplexity_ratio']:.4f}"
    )
    if (floor := agreement.get("floor_top1")) is not None:
        text += f" (with the last bits of its embeddings changed, the trained model agrees with itself at {floor:.2%})"
    return text


@contextmanager
def shaken(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model with the last bits of its embeddings' output changed at random, the same way every time."""
    generator = torch.Generator()

    def change(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        generator.manual_seed(0)
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output * (1 + LAST_BITS * signs.to(output.device))

    handle = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield model
    finally:
        handle.remove()


def noise_floor(model: nn.Module, windows: Tensor) -> Agreement:
    """How the model agrees with itself when its embeddings change in their last bits."""
    if isinstance(model, Recorded):
        assert model.floor is not None, "the floor was not recorded"
        return model.floor
    return compare(model, model, windows, other_context=shaken)


@torch.no_grad()
def compare(
    reference: nn.Module, other: Any, windows: Tensor, positions: int = POSITIONS,
    other_context: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> Agreement:  # fmt: skip
    """Compare logits in fp32 on the first `positions` of token windows [N, W + 1], both models on the reference's device.

    `other_context` is entered around every forward of `other`.
    """
    device = next(iter(reference.parameters()), windows).device
    other.to(device)

    def pairs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        seen = 0
        for window in windows:
            if seen >= positions:
                break
            inputs, targets = window[None, :-1].to(device), window[1:].to(device)
            with torch.autocast(device.type, enabled=False):
                a = reference(input_ids=inputs, use_cache=False).logits[0].float()
            # transformers' bitnet classes would want a C++ compiler
            with torch.compiler.set_stance("force_eager"), other_context(other):
                b = other(input_ids=inputs, use_cache=False).logits[0].float()
            left = positions - seen
            yield a[:left], b[:left], targets[:left]
            seen += len(a[:left])

    return agreement_of(pairs())


class Recorded(nn.Module):
    """The logits of a model that is not here (any more), on some windows: called with one of these windows' tokens, [1, T], it
    gives them back, as the model would have. floor: the model's agreement with itself, if it was asked for."""

    floor: Agreement | None = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.seen[_key(input_ids)][None])


def record(model: PreTrainedModel, windows: Tensor, keep: bool = True, floor: bool = True) -> Recorded:
    """What `compare` will want to know of a model as its reference: fp32 logits, on the CPU, of as many of the token windows
    [N, W + 1] as it reads. Of a model in parts every rank has to ask; keep: whether this one is to have them."""
    recorded, seen = Recorded(), 0
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        for window in windows:
            if seen >= POSITIONS:
                break
            inputs = window[None, :-1]
            logits = model(input_ids=inputs.to(model.device), use_cache=False).logits[0].float()
            seen += len(logits)
            if keep:
                recorded.seen[_key(inputs)] = logits.cpu()
        if floor:
            recorded.floor = noise_floor(model, windows)
    return recorded


def _key(input_ids: Tensor) -> bytes:
    return input_ids.cpu().numpy().tobytes()


def agreement_of(pairs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Agreement:
    """From pieces of logits, or log probabilities, of two models, [T, V] each, and targets [T]."""
    agree = difference = divergence = 0.0
    changes: list[Tensor] = []  # in nats, position by position
    for a, b, targets in pairs:
        p, q = F.log_softmax(a, dim=-1), F.log_softmax(b, dim=-1)
        agree += (a.argmax(-1) == b.argmax(-1)).sum().item()
        difference += (a - b).abs().mean(-1).sum().item()
        divergence += _divergence(p, q).sum(-1).sum().item()
        changes.append((F.nll_loss(q, targets, reduction="none") - F.nll_loss(p, targets, reduction="none")).double())
    seen = sum(map(len, changes))
    assert seen > 0, "no positions to compare"
    change = torch.cat(changes)
    error = change.std(correction=0).item() / seen**0.5
    return Agreement(seen, agree / seen, difference / seen, divergence / seen, perplexity(change.mean().item()), error)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """What each entry adds to KL(p ‖ q) in nats, from log probabilities [T, V]: p · log(p / q) − p + q, which sums to the same
    and is nowhere negative. Of models that hardly differ the plain sum is what is left of rounding in fp32, and can be."""
    change = q - p
    near, far = p.exp() * (change.expm1() - change), q.exp() - p.exp() * (1 + change)
    return torch.where(change.abs() < 0.5, near, far)


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
