"""`trilobit export --to native`: a ternary model as one file that the CPU engine maps, checked by running it.

Written is what compiler.compile would make of the model, without having it in memory. It is read back by the engine and
compared, position by position, with the model that transformers runs (verify.py), in a process of its own. A model that was
trained with full-precision activations is another one with int8 activations: how far off is said, and refused only where too
much is lost.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from trilobit.errors import VerificationError
from trilobit.export.check import Check, Prompt, Row, probe_windows
from trilobit.export.hf import write_companions
from trilobit.export.llama_cpp import CONTINUED
from trilobit.export.source import Source
from trilobit.export.verify import Agreement, compare, noise_floor
from trilobit.infer import compiler, native_file
from trilobit.infer.engine import Engine, open_native
from trilobit.infer.graph import DTYPES, Graph, Planned
from trilobit.infer.loaded import Loaded
from trilobit.kernels.engine import Sampling
from trilobit.listener import SILENT, Listener, timed

PROBE_WINDOWS, PROBE_LENGTH = 8, 256
MOST_KL, MOST_CHANGE, ERRORS = 0.005, 0.001, 3.0  # nats a position; of the loss, beyond so many standard errors
NOISE = 2.0  # times the model's own noise
LOST = 0.1  # nats of the loss of a weights-only model, which int8 activations make another one


class _Reading:
    """The engine where compare() expects a module: [1, T] token ids → logits."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def to(self, device: Any) -> "_Reading":
        return self

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.engine.logits(input_ids[0])[None]})


def write(source: Source, directory: Path, layout: str, listener: Listener = SILENT) -> tuple[str, str, dict[str, Any]]:
    """The native file into an existing directory, a matrix at a time: its form, why that one, and what a weight takes. Raises
    NotNative where the engine has no graph."""
    form: Any = None if layout == "auto" else layout
    planned = compiler.plan(source.model, source, form)
    native_file.write(planned, directory / native_file.NAME, timed(listener, "Writing tensors"))
    write_companions(directory, source.model, source.plan, source.tokenizer, "native", {})
    form = planned.header.layout
    reason = "as asked" if layout != "auto" else "the fastest here"
    return form, reason, {"layout": form, "bits_per_ternary_weight": bits_per_weight(planned)}


def check(loaded: Loaded, artefact: Path, data: str | None) -> Check:
    """The engine's reading of what was written, compared with the model it was made from (its ternary modules frozen). Raises
    VerificationError where it is another one."""
    probe = probe_windows(loaded, data, PROBE_WINDOWS, PROBE_LENGTH)
    graph, tokenizer, ends = open_native(artefact, complete=False)
    prompt = Prompt(loaded, probe)
    engine = Engine(graph, tokenizer, ends, capacity=max(probe.shape[1], len(prompt.ids) + CONTINUED))
    agreement = compare(loaded.model, _Reading(engine), probe)
    activations = graph.header.activations
    _require_same(agreement, activations, lambda: noise_floor(loaded.model, probe), sampled=data is None)
    limits = f"KL {MOST_KL} or twice the model's own noise, perplexity within 0.1 % and three standard errors"
    limits += ", on this sampled text beyond what the KL explains" if data is None else ""
    if activations != "token":
        limits = f"{LOST} nats of loss: the engine's int8 activations make a weights-only model another one"
    theirs = prompt.decoded(list(engine.stream(prompt.ids, CONTINUED, Sampling(temperature=0))))
    rows = [Row("the engine", "the model", agreement)]
    return Check(rows, limits, prompt.text, prompt.continued_by(loaded.model), theirs)


def bits_per_weight(model: Graph | Planned) -> float:
    """Bits that a weight of the layers' matrices takes, with its part of padding and scales."""
    parts = {name: spec for name, spec in model.specs.items() if name.startswith("layers.")}
    stored = sum(
        math.prod(shape) * DTYPES[dtype].itemsize
        for name, (dtype, shape) in parts.items()
        if name.endswith((".codes", ".scales"))
    )
    weights = model.header.layers * sum(rows * columns for rows, columns in model.header.matrices().values())
    return 8 * stored / weights


def _require_same(agreement: Agreement, activations: str, floor: Callable[[], Agreement], sampled: bool = False) -> None:
    """Raise VerificationError unless the engine's reading is the model. sampled: the text is the model's own.

    Its rounding (keys, values and embeddings in bf16, an int8 head) flips int8 codes that breed flips, as any change of the
    last bits does: top-1 is no measure of it. KL is small, or of the size of the model's own noise, and the loss is the same.
    On text that p has sampled any other q has the larger loss, by log p/q, whose mean is KL(p ‖ q): that much is no sign.
    """
    change = math.log(agreement.perplexity_ratio) if agreement.perplexity_ratio > 0 else math.inf
    if sampled and change > 0:
        change = max(0.0, change - agreement.kl)
    change = abs(change)
    if activations == "token":
        same = change <= MOST_CHANGE + ERRORS * agreement.nats_error
        same = same and math.isfinite(agreement.kl) and (agreement.kl <= MOST_KL or agreement.kl <= NOISE * floor().kl)
    else:
        same = math.isfinite(agreement.kl) and change <= LOST
    if not same:
        raise VerificationError(
            f"the engine reads another model: KL {agreement.kl:.5f}, perplexity × {agreement.perplexity_ratio:.4f}, same "
            f"argmax at {agreement.top1:.2%} of {agreement.positions} positions. It was not left behind."
        )
