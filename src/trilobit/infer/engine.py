"""Text from a ternary model on the native engine: open one, continue a prompt token by token, measure its logits.

    open_engine(source)    a native directory is mapped or copied and is ready; any other ternary model is loaded through
                           transformers and compiled (infer/compiler.py), which takes as long as loading it
    Engine.stream(ids)     prompt in chunks through the matrix–matrix kernels, then a token a call

What is already in the cache is kept: a prompt that begins as the text before it is read from where they part, so that a
conversation costs its new words only.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from trilobit.errors import ConfigError, ModelError
from trilobit.infer import compiler, native_file
from trilobit.infer.compiler import NotNative
from trilobit.infer.graph import Graph
from trilobit.infer.load import load
from trilobit.infer.loaded import Loaded, load_tokenizer
from trilobit.infer.stored import CARD, freeze
from trilobit.kernels import native
from trilobit.kernels.engine import Cache, Sampler, Sampling, Session
from trilobit.kernels.native import Format
from trilobit.storage import MANIFEST, is_whole, read_json, verify_manifest

PROMPT_CHUNK = 512
DEFAULT_CAPACITY = 4096


@dataclass
class Timing:
    """Tokens and seconds of a prompt and of what was generated after it."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Engine:
    """A native model with its tokenizer. One sequence at a time; Session runs several."""

    def __init__(
        self, model: Graph, tokenizer: Any, stops: Sequence[int], *, capacity: int | None = None, cache: Cache = "bf16",
        threads: int | None = None, instructions: str | None = None,
    ):  # fmt: skip
        self.graph, self.tokenizer, self.stops = model, tokenizer, frozenset(stops)
        self.capacity = min(capacity or DEFAULT_CAPACITY, model.header.positions)
        self._options: dict[str, Any] = {"cache": cache, "threads": threads, "instructions": instructions}
        self.session = self._session()
        self.cached: list[int] = []
        self._reader: object = None  # the stream whose text is cached
        self._slots = torch.zeros(self.session.most_tokens, dtype=torch.int32)
        self._logits = torch.empty(1, model.header.vocabulary)

    def _session(self) -> Session:
        most = min(PROMPT_CHUNK, self.capacity)
        return Session(self.graph.decoder(), capacity=self.capacity, most_tokens=most, **self._options)

    def reserve(self, tokens: int) -> None:
        """Make room for a text of so many tokens, as far as the model has positions. What was cached is read again."""
        tokens = min(tokens, self.graph.header.positions)
        if tokens <= self.capacity:
            return
        before, self.capacity = (self.session, self.capacity), tokens
        try:
            self.session = self._session()
        except ModelError:
            self.session, self.capacity = before
            raise
        before[0].close()
        self.cached.clear()
        self._slots = torch.zeros(self.session.most_tokens, dtype=torch.int32)

    def _run(self, ids: Sequence[int], rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Append tokens, at most a chunk, to what is cached."""
        start, count = len(self.cached), len(ids)
        positions = torch.arange(start, start + count, dtype=torch.int32)
        logits = self.session.run(torch.tensor(ids, dtype=torch.int32), self._slots[:count], positions, rows, out)
        self.cached.extend(ids)
        return logits

    def read(self, ids: Sequence[int]) -> int:
        """Make `ids` what is cached; its last token's logits are then in place. Returns how many tokens had to be run.

        Raises ConfigError where they do not fit, or there are none.
        """
        if not ids:
            raise ConfigError("the prompt is empty, and this tokenizer has no beginning-of-text token to start from.")
        if len(ids) > self.capacity:
            raise ConfigError(f"the prompt has {len(ids)} tokens, and there is room for {self.capacity}: shorten it.")
        if outside := [i for i in ids if not 0 <= i < self.graph.header.vocabulary]:
            raise ModelError(f"the prompt has a token {outside[0]}, beyond the model's embedding.")
        self._reader = None
        kept = 0
        while kept < min(len(ids) - 1, len(self.cached)) and ids[kept] == self.cached[kept]:
            kept += 1
        del self.cached[kept:]
        chunk, nothing = self.session.most_tokens, torch.empty(0, dtype=torch.int32)
        starts = range(kept, len(ids), chunk)
        for start in starts:
            part = ids[start : start + chunk]
            if start == starts[-1]:
                self._run(part, out=self._logits)
            else:
                self._run(part, rows=nothing)
        return len(ids) - kept

    def stream(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling, seed: int = 0, timing: Timing | None = None,
        ends: bool = True,
    ) -> Iterator[int]:  # fmt: skip
        """Yield up to max_tokens tokens that continue `ids`, the last one an end-of-text token if the text `ends`.

        Streams may take turns: one that was interrupted by another reads its text again.
        """
        timing, me, history = timing or Timing(), object(), list(ids)
        sampler = Sampler(sampling, seed)
        for _ in range(min(max_tokens, self.capacity - len(ids))):
            started = time.perf_counter()
            if len(history) == len(ids):
                timing.prompt_tokens = self.read(history)
                timing.prompt_seconds = time.perf_counter() - started
                started = time.perf_counter()
            elif self._reader is me:
                self._run(history[-1:], out=self._logits)
            else:
                self.read(history)
            self._reader = me
            token = sampler(self._logits[0], history)
            history.append(token)
            timing.tokens += 1
            timing.seconds += time.perf_counter() - started
            yield token
            if ends and token in self.stops:
                return

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [T, V] fp32 of every position of a text [T] that fits into the cache, from its beginning."""
        self.cached.clear()
        self._reader = None
        out = torch.empty(ids.numel(), self.graph.header.vocabulary)
        chunk = self.session.most_tokens
        for start in range(0, ids.numel(), chunk):
            part = ids[start : start + chunk].tolist()
            rows = torch.arange(len(part), dtype=torch.int32)
            self._run(part, rows, out[start : start + len(part)])
        return out


def is_native(source: str | Path) -> bool:
    """Whether `source` is a directory that holds a native model."""
    return (Path(source) / native_file.NAME).is_file()


def open_native(
    path: Path, verify: bool = False, memory: native_file.Memory | None = None, complete: bool = True
) -> tuple[Graph, Any, list[int]]:
    """Graph, tokenizer and end-of-text tokens of a native directory. verify: read all of it against its checksums; otherwise
    the sizes of its files are compared, unless it is still being written (not `complete`).

    Raises ModelError where it is not whole.
    """
    if verify:
        verify_manifest(path)
    elif complete and not is_whole(path):
        raise ModelError(f"{path} is not whole: files are missing, or have other sizes than its {MANIFEST} says.")
    if not (path / CARD).is_file() or read_json(path / CARD).get("form") != "native":
        raise ModelError(f"{path} holds {native_file.NAME}, but no {CARD} that says so: it was not completely written.")
    return native_file.read(path / native_file.NAME, memory), load_tokenizer(path), _stops(path)


def _stops(path: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file() and (eos := read_json(path / name).get("eos_token_id")) is not None:
            return eos if isinstance(eos, list) else [eos]
    return []


def end_tokens(model: Any) -> list[int]:
    """The tokens that end a text, according to the checkpoint."""
    config: GenerationConfig | None = model.generation_config
    eos: Any = config.eos_token_id if config else None
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def engine_of(loaded: Loaded, form: Format | None = None, **options: Any) -> Engine:
    """The engine of a model that transformers has loaded. Raises NotNative with the reason where there is none.

    A trainable model (latent/) is frozen in place.
    """
    require_library()
    freeze(loaded.model)
    return Engine(compiler.compile(loaded.model, form), loaded.tokenizer, end_tokens(loaded.model), **options)


def require_library() -> None:
    """Raise NotNative without the native library."""
    if not native.available():
        raise NotNative(f"no native kernels: {native.choice().reason}.")


def open_engine(source: str | Path, **options: Any) -> Engine:
    """The engine of whatever `source` names. Raises NotNative where only transformers runs it, ModelError as load()."""
    require_library()
    if is_native(source):
        model, tokenizer, stops = open_native(Path(source))
        return Engine(model, tokenizer, stops, **options)
    return engine_of(load(source), **options)
