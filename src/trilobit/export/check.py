"""What a check of an export says, and on what: two readings of a model are compared on windows of text and on a few words.

Each consumer has its own: check_stock.py (transformers), check_llama_cpp.py, native.py (the engine), compressed.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit.corpus import documents
from trilobit.errors import DataError, ModelError
from trilobit.export.llama_cpp import CONTINUED
from trilobit.export.verify import Agreement
from trilobit.infer.hf import continue_tokens
from trilobit.infer.loaded import Loaded
from trilobit.measure.perplexity import text_windows
from trilobit.nn.packed import PackedLinear

PROBE_LENGTH = 129
PROBE_WINDOWS = {"gguf": 8, "hf": 32, "bf16": 32, "compressed-tensors": 32}  # 1,024 positions one by one, or 4,096
LEAST_POSITIONS = 1000  # of a text that the user gave
LEAST_SHOWN = 1e-4  # nats: smaller ones are written with an exponent
MOST_BF16_KL = 0.001  # of a model without quantisation
ERRORS = 3.0  # standard errors of the perplexity's change


@dataclass(frozen=True)
class Row:
    """One comparison: who read it, and how that agrees with what."""

    reader: str
    against: str
    agreement: Agreement


@dataclass(frozen=True)
class Check:
    """What the consumer made of the artefact. why_not: why there was no check."""

    rows: list[Row] = field(default_factory=list)
    limits: str = ""
    prompt: str = ""
    ours: str = ""
    theirs: str = ""
    why_not: str | None = None

    def table(self) -> list[str]:
        """As Markdown."""
        if self.why_not is not None:
            return [f"Not checked: {self.why_not}"]
        heads = ("reading", "compared with", "positions", "same argmax", "mean \\|Δ logit\\|", "KL (nats)", "perplexity")
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in self.rows:
            a = row.agreement
            kl = f"{a.kl:.5f}" if abs(a.kl) >= LEAST_SHOWN else f"{a.kl:.1e}"
            numbers = f"{a.positions:,} | {a.top1:.2%} | {a.mean_difference:.4f} | {kl} | × {a.perplexity_ratio:.4f}"
            lines.append(f"| {row.reader} | {row.against} | {numbers} |")
        lines += ["", f"Limits: {self.limits}."]
        if self.prompt:
            lines += ["", f"{self.prompt!r} is continued by the model with {self.ours!r}, there with {self.theirs!r}."]
        return lines


def probe_windows(loaded: Loaded, data: str | None, count: int, length: int = PROBE_LENGTH) -> Tensor:
    """Token windows [N, W + 1] to compare readings on: of a text, or sampled from the model (not from what is checked: its own
    text flatters it)."""
    length = min(length, getattr(loaded.model.config, "max_position_embeddings", length))
    if data is not None:
        texts = (document.text for document in documents(data))
        least = -(-LEAST_POSITIONS // (length - 1))
        try:
            windows = text_windows(texts, loaded.tokenizer, length, False, count)[0]
        except DataError:  # not one window
            windows = torch.empty(0, length, dtype=torch.int64)
        if len(windows) < min(least, count):
            raise DataError(
                f"--data {data} is too short to compare models on: it has {len(windows)} windows of {length} tokens, and "
                f"{min(least, count)} are wanted. Give a longer text, or none: then it is sampled from the model."
            )
        return windows
    start: Any = loaded.tokenizer.bos_token_id
    start = loaded.tokenizer.eos_token_id if start is None else start
    if start is None:
        raise ModelError("this tokenizer has no token to sample a text from: give --data.")
    prompts = torch.full((count, 1), start)
    return continue_tokens(loaded.model, prompts, length - 1, temperature=1.0, ends=False)


class Prompt:
    """A few words to be continued by both, for people to see: the beginning of the first window."""

    def __init__(self, loaded: Loaded, windows: Tensor):
        self._tokenizer: Any = loaded.tokenizer
        self.text = str(self._tokenizer.decode(windows[0, 1:9], skip_special_tokens=True))
        self.ids: list[int] = self._tokenizer(self.text)["input_ids"] or windows[0, :1].tolist()

    def continued_by(self, model: PreTrainedModel) -> str:
        """Its likeliest tokens, as text."""
        with torch.compiler.set_stance("force_eager"):  # transformers' bitnet classes would want a C++ compiler
            tokens = continue_tokens(model, torch.tensor([self.ids]), CONTINUED)
        return self.decoded(tokens[0, len(self.ids) :].tolist())

    def decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


@contextmanager
def activations(model: torch.nn.Module, int8: bool) -> Iterator[torch.nn.Module]:
    """The model with int8 activations in its ternary linears, or with none quantised."""
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    before = [m.int8_activations for m in linears]
    for linear in linears:
        linear.int8_activations = int8
    try:
        yield model
    finally:
        for linear, value in zip(linears, before, strict=True):
            linear.int8_activations = value


@contextmanager
def replaced(instead: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Other values in parameters and buffers while the block runs."""
    before = [tensor.data for tensor, _ in instead]
    for tensor, value in instead:
        tensor.data = value
    try:
        yield
    finally:
        for (tensor, _), value in zip(instead, before, strict=True):
            tensor.data = value
