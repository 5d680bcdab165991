"""Does the consumer read what was trained? In a process of its own: python -m trilobit.export.verification FOLDER.

    hf      transformers                against the model                                   verify.py's limits
    bf16    transformers                against the model without activation quantisation   KL ≤ 0.001, perplexity 0.1 %
    gguf    llama.cpp (xllamacpp)       against the model                                   see below
    native  the engine                  against the model                                   native.py's

llama.cpp quantises activations in blocks of its own, or not at all, so it is not the same model to the last digit. How far
int8 activations take this very model from none is the measure: KL(ours ‖ llama.cpp) ≤ 2 × KL(int8 ‖ none, embedding and head
rounded as the file has them, and what a quantised head reads as llama.cpp rounds that), and the loss the same within 1 % of
perplexity and three standard errors. Ordinary models: KL ≤ 0.001. Both must make the same tokens of text.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilobit import errors
from trilobit.corpus import documents
from trilobit.errors import DataError, ModelError, TrilobitError, VerificationError
from trilobit.export.exact import is_comparable, require_exact
from trilobit.export.llama_cpp import CONTINUED
from trilobit.export.source import Source
from trilobit.export.verify import MAX_PERPLEXITY_CHANGE, MIN_TOP1, Agreement, compare, load_stock, noise_floor
from trilobit.infer.gguf_file import open_gguf
from trilobit.infer.hf import continue_tokens
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded
from trilobit.infer.stored import freeze
from trilobit.listener import Listener
from trilobit.measure.perplexity import text_windows
from trilobit.nn.packed import PackedEmbedding, PackedLinear
from trilobit.storage import read_json

PROBE_LENGTH = 129
PROBE_WINDOWS = {"gguf": 8, "hf": 32, "bf16": 32, "compressed-tensors": 32}  # 1,024 positions one by one, or 4,096
LEAST_POSITIONS = 1000  # of a text that the user gave
MOST_TIMES, MOST_BF16_KL = 2.0, 0.001
ROUNDED_WINDOWS = 8
LEAST_SHOWN = 1e-4  # nats: smaller ones are written with an exponent
MOST_CHANGE, ERRORS = 0.01, 3.0  # of perplexity; and standard errors
TRICKY = ["Hello, ﬁ ½①", "  two spaces\n\n\ttab", "don't, it's 12345 naïve café — 你好 🙂", "def f(x):\n    return x ** 2\n"]


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


def verify(model: Path, artefact: Path, to: str, data: str | None, listener: Listener) -> Check:
    """Check what was written to `artefact`. Raises VerificationError if it is another model."""
    listener.note("checking what was written")
    if to == "gguf":
        from trilobit.export import llama_cpp

        if not llama_cpp.available():
            return Check(why_not="llama.cpp is not installed here (pip install 'trilobit[gguf]' brings it as xllamacpp)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {"model": str(model.absolute()), "artefact": str(artefact.absolute()), "to": to, "data": data}
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-W", "ignore", "-m", "trilobit.export.verification", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (folder / "answer.json").exists():
            raise VerificationError(f"the check did not end: {done.stderr[-400:]} Nothing was left behind.")
        answer = read_json(folder / "answer.json")
    if "error" in answer:
        raise getattr(errors, answer["kind"], VerificationError)(answer["error"])
    rows = [Row(row["reader"], row["against"], Agreement(**row["agreement"])) for row in answer.pop("rows")]
    return Check(rows, **answer)


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


# ── the other process ──


def check_stock(loaded: Loaded, artefact: Path, windows: Tensor) -> Check:
    """transformers' reading: of the model where its ternary classes hold it, else of it without quantised activations."""
    other = load_stock(artefact)
    prompt = Prompt(loaded, windows)
    theirs = prompt.continued_by(other)
    quantization = read_json(artefact / "config.json").get("quantization_config")
    if quantization is not None:
        agreement = compare(loaded.model, other, windows)
        agreement = agreement.require("transformers' reading", cache(lambda: noise_floor(loaded.model, windows)))
        limits = "same argmax at 98.5 % and perplexity within 0.1 %, or no further off than the model's own last bits take it"
        source = Source(loaded.model, loaded.plan)
        if is_comparable(source, quantization):
            require_exact(source, other)
            moved = source.plan is not None and source.plan.spec.placement == "output"
            exactly = "bit for bit" + (" (gains that had moved into linears: within two roundings)" if moved else "")
            limits += f"; all codes, scales and gains that it has loaded are the model's, {exactly}"
        rows = [Row("transformers", "the model", agreement)]
        return Check(rows, limits, prompt.text, prompt.continued_by(loaded.model), theirs)
    with activations(loaded.model, False):
        agreement = compare(loaded.model, other, windows)
        ours = prompt.continued_by(loaded.model)
        with _bf16_weights(loaded.model):
            exactly = compare(loaded.model, other, windows[:ROUNDED_WINDOWS])
    change = abs(math.log(agreement.perplexity_ratio))
    same = exactly.top1 >= MIN_TOP1 and agreement.kl <= MOST_BF16_KL
    if not same or change > MAX_PERPLEXITY_CHANGE + ERRORS * agreement.nats_error:
        raise VerificationError(
            f"transformers reads another model: KL {agreement.kl:.5f}, perplexity × {agreement.perplexity_ratio:.4f}, and the "
            f"argmax of the model rounded to bf16 at {exactly.top1:.2%} of the positions. It was not left behind."
        )
    against = "the model" if loaded.plan is None else "the model, activations not quantised"
    limits = f"what rounding to bf16 may do: KL {MOST_BF16_KL}, perplexity within 0.1 % and three standard errors; and the "
    limits += f"argmax of the model so rounded at {MIN_TOP1:.1%}"
    rows = [Row("transformers", against, agreement), Row("transformers", f"{against}, rounded to bf16", exactly)]
    return Check(rows, limits, prompt.text, ours, theirs)


@contextmanager
def _bf16_weights(model: torch.nn.Module) -> Iterator[None]:
    """The model with its matrices, and the scales of ternary ones, rounded to bf16 while the block runs."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    tensors = [p for p in model.parameters() if p.ndim >= 2] + [module.scale for module in packed]
    with _values([(tensor, tensor.data.bfloat16().to(tensor.dtype)) for tensor in tensors]):
        yield


@contextmanager
def _values(instead: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Other values in parameters and buffers while the block runs."""
    before = [tensor.data for tensor, _ in instead]
    for tensor, value in instead:
        tensor.data = value
    try:
        yield
    finally:
        for (tensor, _), value in zip(instead, before, strict=True):
            tensor.data = value


def check_llama_cpp(loaded: Loaded, file: Path, windows: Tensor) -> Check:
    """llama.cpp's reading."""
    from trilobit.export import llama_cpp

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
        from trilobit.export.gguf_blocks import rounded

        def inputs(module: torch.nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            return rounded(given[0], "q8_0")

        handle = self.head.register_forward_pre_hook(inputs) if self.kind in ("q8_0", "q6_k") else None
        try:
            with _values(self.values):
                yield
        finally:
            if handle is not None:
                handle.remove()


def _ends_as_stored(model: Any, file: Path) -> Rounded:
    """`model`'s own embedding and head, rounded as the types in `file` round. What the file holds is not looked at."""
    from trilobit.export.gguf_blocks import KINDS, rounded

    tensors, kinds = open_gguf(file).tensors, {number: kind for kind, (_, _, number) in KINDS.items()}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    name = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    for stored, module in ((name, model.get_output_embeddings()), ("token_embd.weight", model.get_input_embeddings())):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and tensors[stored].ternary is None:
            found.setdefault(id(weight), (weight, rounded(weight, kinds[tensors[stored].kind])))
    return Rounded(kinds[tensors[name].kind] if found else "", list(found.values()), model.get_output_embeddings())


def check(loaded: Loaded, artefact: Path, to: str, data: str | None) -> Check:
    """Whether the consumer of a form reads what was written to a directory as the model it was made from (frozen)."""
    if to == "native":
        from trilobit.export import native

        return native.check(loaded, artefact, data)
    windows = probe_windows(loaded, data, PROBE_WINDOWS[to])
    if to == "gguf":
        return check_llama_cpp(loaded, next(artefact.glob("*.gguf")), windows)
    return check_stock(loaded, artefact, windows)


def main(folder: Path) -> None:
    request = read_json(folder / "request.json")
    try:
        loaded = load(request["model"])
        freeze(loaded.model)
        answer = asdict(check(loaded, Path(request["artefact"]), request["to"], request["data"]))
    except TrilobitError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
