"""llama.cpp's reading of a GGUF file.

llama.cpp quantises activations in blocks of its own, or not at all, so it is not the same model to the last digit. How far
int8 activations take this very model from none is the measure: KL(ours ‖ llama.cpp) ≤ 2 × KL(int8 ‖ none, embedding and head
rounded as the file has them, and what a quantised head reads as llama.cpp rounds that), and the loss the same within 1 % of
perplexity and three standard errors. Ordinary models: KL ≤ 0.001. Both must make the same tokens of text.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilobit.errors import VerificationError
from trilobit.export import llama_cpp
from trilobit.export.check import ERRORS, MOST_BF16_KL, Check, Prompt, Row, activations, replaced
from trilobit.export.gguf_blocks import KINDS, rounded
from trilobit.export.verify import Agreement, compare
from trilobit.infer.gguf_file import open_gguf
from trilobit.infer.loaded import Loaded
from trilobit.nn.packed import PackedLinear

MOST_TIMES, MOST_CHANGE = 2.0, 0.01  # of the model's own KL; of perplexity
TRICKY = ["Hello, ﬁ ½①", "  two spaces\n\n\ttab", "don't, it's 12345 naïve café — 你好 🙂", "def f(x):\n    return x ** 2\n"]


def check_llama_cpp(loaded: Loaded, file: Path, windows: Tensor) -> Check:
    """llama.cpp's reading."""

    texts = [*TRICKY, *(loaded.tokenizer.decode(window, skip_special_tokens=True) for window in windows[:2])]
    prompt = Prompt(loaded, windows)
    reading = llama_cpp.read(file, windows, texts, prompt.text)
    for text, theirs in zip(texts, reading.tokens, strict=True):
        expected: Any = loaded.tokenizer(text)["input_ids"]
        if expected != theirs:
            raise VerificationError(
                f"llama.cpp makes other tokens of {text[:60]!r}: {theirs[:8]}…, not {expected[:8]}…. It was not left behind."
            )
    agreement = llama_cpp.compare_reading(loaded.model, reading, windows)
    rows = [Row("llama.cpp", "the model", agreement)]
    change, allowed = abs(math.log(agreement.perplexity_ratio)), MOST_CHANGE + ERRORS * agreement.nats_error
    if loaded.plan is None:
        most, limits = MOST_BF16_KL, f"KL {MOST_BF16_KL}, perplexity within {math.expm1(allowed):.1%}"
    else:
        rounded = _ends_as_stored(loaded.model, file)
        against = "the model, none quantised" + (f", head {rounded.kind}" if rounded.kind else "")
        rows.append(Row("the model, int8 activations", against, _own_distance(loaded.model, windows, rounded)))
        most = MOST_TIMES * rows[1].agreement.kl
        limits = f"KL at most twice what the second row has, perplexity within {math.expm1(allowed):.1%}"
    if not (math.isfinite(agreement.kl) and agreement.kl <= most and change <= allowed):
        raise VerificationError(
            f"llama.cpp reads another model: KL {agreement.kl:.2g} (limit {most:.2g}), perplexity × "
            f"{agreement.perplexity_ratio:.4f}, same argmax at {agreement.top1:.2%} of {agreement.positions} positions. It was "
            "not left behind."
        )
    return Check(rows, limits, prompt.text, prompt.continued_by(loaded.model), reading.continuation)


def _own_distance(model: torch.nn.Module, windows: Tensor, rounded: "Rounded") -> Agreement:
    """Of the model with int8 activations from the model with none, its embedding and head rounded."""
    assert any(isinstance(module, PackedLinear) for module in model.modules()), "not a ternary model, or not a frozen one"

    @contextmanager
    def plain(other: torch.nn.Module) -> Iterator[None]:
        with activations(other, False), rounded.in_place():
            yield

    with activations(model, True):
        return compare(model, model, windows, other_context=plain)


@dataclass
class Rounded:
    """Embedding and head of a model as llama.cpp has them. kind: of the head, "" where there is nothing to round; values: the
    matrices, rounded; head: whose inputs are rounded as well, in blocks of 32 to 8 bits, where its weights are quantised."""

    kind: str
    values: list[tuple[Tensor, Tensor]]
    head: torch.nn.Module

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with these while the block runs."""

        def inputs(module: torch.nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            return rounded(given[0], "q8_0")

        handle = self.head.register_forward_pre_hook(inputs) if self.kind in ("q8_0", "q6_k") else None
        try:
            with replaced(self.values):
                yield
        finally:
            if handle is not None:
                handle.remove()


def _ends_as_stored(model: Any, file: Path) -> Rounded:
    """`model`'s own embedding and head, rounded as the types in `file` round. What the file holds is not looked at."""

    tensors, kinds = open_gguf(file).tensors, {number: kind for kind, (_, _, number) in KINDS.items()}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    name = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    for stored, module in ((name, model.get_output_embeddings()), ("token_embd.weight", model.get_input_embeddings())):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and tensors[stored].ternary is None:
            found.setdefault(id(weight), (weight, rounded(weight, kinds[tensors[stored].kind])))
    return Rounded(kinds[tensors[name].kind] if found else "", list(found.values()), model.get_output_embeddings())
