"""Whoever continues token ids as text: the native engine, or transformers.

    open_writer(config)  ──▶  Writer.write(ids, …, emit) ──▶ text, piece by piece, and what it took

The choice is made here, once, and said with its reason: the native engine runs ternary models of the families it has a graph
for on a CPU, transformers everything else.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer

from trilobit.config.running import EngineConfig, RunningConfig
from trilobit.errors import ConfigError
from trilobit.infer.compiler import NotNative
from trilobit.infer.engine import Engine, Timing, engine_of, is_native, open_native, require_library
from trilobit.infer.hf import continue_tokens
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded, pick_device
from trilobit.kernels import native
from trilobit.kernels.engine import Sampling
from trilobit.listener import SILENT, Listener

DEFAULT_TOKENS = 128
NATIVE_ONLY = {"threads": None, "instructions": None, "cache": "bf16", "verify": False}
Emit = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """Token ids that were generated, an end-of-text token included, and their timing."""

    ids: list[int]
    timing: Timing


class Interrupted(KeyboardInterrupt):
    """The user stopped a text. Has what was written of it."""

    def __init__(self, written: Written):
        super().__init__("interrupted")
        self.written = written


class Writer(ABC):
    """A model that continues token ids. positions: most tokens of a text; name: of the engine; what: that and the reason."""

    tokenizer: Any
    positions: int
    name: str
    what: str

    @abstractmethod
    def write(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling, seed: int, emit: Emit, ends: bool = True
    ) -> Written:  # fmt: skip
        """Continue `ids` by up to max_tokens tokens, telling `emit` the text without special tokens as it comes. Unless it
        `ends`, an end-of-text token is a token like others. Raises Interrupted with what there is on Ctrl-C."""

    def start(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises ConfigError if there are none, or the text is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8
            raise ConfigError("the prompt is not valid UTF-8.") from error
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if ids:
            return ids
        if self.tokenizer.bos_token_id is None:
            raise ConfigError("the prompt is empty, and this tokenizer has no beginning-of-text token to start from.")
        return [self.tokenizer.bos_token_id]

    def room(self, prompt: int, wanted: int | None) -> int:
        """How many tokens may follow a prompt of so many: those wanted, by default DEFAULT_TOKENS or what there is room for.
        Raises ConfigError if the model has fewer positions than were asked for."""
        left = self.positions - prompt
        if left <= 0:
            raise ConfigError(f"the prompt has {prompt} tokens, and the model {self.positions} positions: shorten it.")
        if wanted is not None and wanted > left:
            raise ConfigError(
                f"--max-tokens {wanted} after a prompt of {prompt} tokens is more than the model's {self.positions} positions: "
                f"at most {left} fit."
            )
        return min(DEFAULT_TOKENS, left) if wanted is None else wanted


class NativeWriter(Writer):
    """The native engine."""

    def __init__(self, engine: Engine, instructions: str | None = None):
        self.engine, self.tokenizer, self.positions = engine, engine.tokenizer, engine.graph.header.positions
        choice = native.choice() if instructions is None else native.Instructions(instructions, "--instructions")
        self.name = "native"
        threads = "1 thread" if engine.session.threads == 1 else f"{engine.session.threads} threads"
        self.what = f"native engine, {threads}, {choice.name}: {choice.reason}"

    def write(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling, seed: int, emit: Emit, ends: bool = True
    ) -> Written:  # fmt: skip
        self.engine.reserve(len(ids) + max_tokens)
        pieces, timing = Pieces(self.tokenizer), Timing()
        try:
            for token in self.engine.stream(ids, max_tokens, sampling, seed, timing, ends):
                pieces.add(token, emit)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(Written(pieces.ids, timing)) from interrupt
        pieces.finish(emit)
        return Written(pieces.ids, timing)


class Pieces:
    """Token ids as text, piece by piece: what decoding a few tokens more adds to what decoding them gave before. Decoders join
    words, strip spaces and put bytes together, so that a token has no text of its own."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = self.told = 0  # a piece is decoded from `start`; up to `told` it has been emitted

    def _text(self, start: int, end: int | None = None) -> str:
        ids = self.ids[start:end]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def add(self, token: int, emit: Emit) -> None:
        """Take a token; emit what is now certain: an unfinished character waits for its other bytes."""
        self.ids.append(token)
        before, now = self._text(self.start, self.told), self._text(self.start)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            emit(now[len(before) :])
            self.start, self.told = self.told, len(self.ids)

    def finish(self, emit: Emit) -> None:
        """Emit what waited in vain."""
        before, now = self._text(self.start, self.told), self._text(self.start)
        if len(now) > len(before):
            emit(now[len(before) :])


class _Stream(TextStreamer):
    def __init__(self, tokenizer: Any, emit: Emit):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.emit(text)


class TransformersWriter(Writer):
    """transformers' own loop, on any device."""

    def __init__(self, loaded: Loaded, reason: str):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        self.positions = positions or 1 << 30
        self.name, self.what = "transformers", f"transformers: {reason}"

    def write(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling, seed: int, emit: Emit, ends: bool = True
    ) -> Written:  # fmt: skip
        inputs = torch.tensor([list(ids)], device=self.model.device)
        started, stream = time.perf_counter(), _Stream(self.tokenizer, emit)

        def written(new: list[int]) -> Written:
            return Written(new, Timing(len(ids), 0.0, len(new), time.perf_counter() - started))

        try:
            output = continue_tokens(
                self.model, inputs, max_tokens, sampling.temperature, sampling.top_p, seed, stream, ends,
                top_k=sampling.top_k, min_p=sampling.min_p, repetition_penalty=sampling.repetition_penalty,
            )  # fmt: skip
        except KeyboardInterrupt as interrupt:
            raise Interrupted(written(stream.ids)) from interrupt
        return written(output[0, len(ids) :].tolist())


def sampling_of(config: RunningConfig) -> Sampling:
    """How a configuration has tokens chosen."""
    return Sampling(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
    )  # fmt: skip


def open_writer(config: EngineConfig, capacity: int | None = None, listener: Listener = SILENT) -> Writer:
    """The writer that a configuration asks for, for texts of up to `capacity` tokens.

    Raises NotNative for --engine native where there is no graph, ModelError as load() does.
    """
    device = pick_device(config.device)
    options = {
        "capacity": capacity, "cache": config.cache, "threads": config.threads, "instructions": config.instructions
    }  # fmt: skip
    if is_native(config.model):
        if config.engine == "transformers" or (device.type != "cpu" and config.device != "auto"):
            raise ConfigError(f"{config.model} is written for the native engine, which runs on the CPU.")
        require_library()
        writer: Writer = NativeWriter(Engine(*open_native(Path(config.model), config.verify), **options), config.instructions)
    elif config.engine == "transformers" or (config.engine == "auto" and device.type != "cpu"):
        reason = "--engine transformers" if config.engine == "transformers" else f"the model is on {device}"
        writer = TransformersWriter(load(config.model, device=device), reason)
    else:
        loaded = load(config.model)
        try:
            writer = NativeWriter(engine_of(loaded, **options), config.instructions)
        except NotNative as error:
            if config.engine == "native":
                raise
            writer = TransformersWriter(loaded, str(error).rstrip("."))
    listener.note(f"Runs on {writer.what}")
    unused = [f"--{name}" for name, default in NATIVE_ONLY.items() if getattr(config, name) != default]
    if writer.name == "transformers" and unused:
        listener.note(f"(without effect there: {', '.join(unused)})")
    return writer
