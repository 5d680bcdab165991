"""Text as tokens on disk: made once, memory-mapped afterwards.

A corpus is tokenised once and kept as one flat array, `tokens.bin` (little-endian uint16, or uint32 where the
vocabulary needs it), the training part first and the held-out part after it. The directory's name is a hash of what it
was made from: the text, the tokenizer's whole definition, the options. Nothing is ever out of date, only unused.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from trilobit import corpus
from trilobit.errors import DataError, ModelError, OutputError
from trilobit.storage import atomic_directory, is_whole, read_json, recorded_sha256, write_json
from trilobit.train.encode import encode_documents

RULE = 1  # raised whenever the same text and tokenizer would give other tokens or another held-out part

Progress = Callable[[int, int], None]  # (bytes of text, tokens) done so far


@dataclass(frozen=True)
class Tokens:
    """Training and held-out tokens, memory-mapped, and the UTF-8 bytes of the text behind each (for bits per byte).

    description: one line for the user. key: the hash of what the tokens were to be made of, which names the cached
    directory. sha256: of the tokens themselves, as they were written.
    """

    train: np.ndarray
    heldout: np.ndarray
    train_bytes: int
    heldout_bytes: int
    description: str
    key: str
    sha256: str


@dataclass(frozen=True)
class TokenFile:
    """A directory with tokens.bin and meta.json, whole or absent."""

    directory: Path

    def write(self, pieces: Iterable[tuple[bool, np.ndarray, int]], vocab_size: int, heldout_tokens: int) -> None:
        """Write (held out?, tokens, bytes of text) pieces. A held-out piece beyond `heldout_tokens` is left out."""
        dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        counts = {"documents": 0, "left_out": 0, "train_tokens": 0, "train_bytes": 0, "heldout_bytes": 0, "largest": -1}
        heldout, held = [], 0
        with atomic_directory(self.directory, replace=False) as partial:
            with (partial / "tokens.bin").open("wb") as file:
                for held_out, ids, size in pieces:
                    counts["documents"] += 1
                    if held_out and held >= heldout_tokens:
                        counts["left_out"] += 1
                        continue
                    if len(ids):
                        assert ids.min() >= 0, f"a token id is {ids.min()}"
                        counts["largest"] = max(counts["largest"], int(ids.max()))
                        _require_vocabulary(counts["largest"], vocab_size)
                    if held_out:
                        heldout.append(ids.astype(dtype))
                        held += len(ids)
                    else:
                        file.write(ids.astype(dtype).tobytes())
                        counts["train_tokens"] += len(ids)
                    counts["heldout_bytes" if held_out else "train_bytes"] += size
                for ids in heldout:
                    file.write(ids.tobytes())
            if counts["train_tokens"] + held == 0:
                raise DataError("there are no tokens: the text is empty.")
            write_json(partial / "meta.json", {"rule": RULE, "dtype": dtype.str, "heldout_tokens": held, **counts})

    def sha256(self) -> str:
        return recorded_sha256(self.directory, "tokens.bin")

    def read(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The tokens, training part first, as a read-only memory map; and meta.json."""
        meta = read_json(self.directory / "meta.json")
        return np.memmap(self.directory / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r"), meta


def prepare(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    text_field: str = "text",
    max_tokens: int | None = None,
    heldout_tokens: int = 262_144,
    sequence_length: int = 512,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Tokens:
    """Tokenise `data` (see corpus.py), or find it tokenised already, under `cache_dir`.

    Every document ends in the end-of-text token (the tokenizer's eos, else its bos); no other special token is added.
    A dataset on the hub is read until `max_tokens` training tokens; files and stdlib are read whole. Documents are held
    out by content until there are `heldout_tokens`; further ones are left out, never trained on. Where that gives less
    than one window of `sequence_length`, or less text to train on than held out, the last 2 % of all tokens are held
    out instead (one window at least, `heldout_tokens` at most). `progress` is called after every document.

    Raises DataError for text that is missing, damaged or too short, ModelError if a token is not below `vocab_size`.
    """
    stream = corpus.is_stream(data)
    if stream and max_tokens is None:
        raise DataError(f"--data {data} is read from the hub and may not end: say how much with --max-tokens.")
    backend = _backend(tokenizer)
    ends = [token for token in (tokenizer.eos_token_id, tokenizer.bos_token_id) if isinstance(token, int)]
    if not ends:
        raise DataError("the tokenizer has neither an eos nor a bos token to put between documents; set eos_token.")
    limit = max_tokens if stream else None
    options = [RULE, corpus.fingerprint(data), text_field, limit, heldout_tokens, ends[0]]
    key = _key("corpus", options, backend)

    def pieces() -> Iterator[tuple[bool, np.ndarray, int]]:
        texts = train = total = 0
        for document, ids in encode_documents(corpus.documents(data, text_field=text_field), backend, ends[0]):
            yield document.held_out, ids, document.bytes
            texts, total = texts + document.bytes, total + len(ids)
            train += 0 if document.held_out else len(ids)
            if progress is not None:
                progress(texts, total)
            if limit is not None and train >= limit:
                return

    return _cached(key, pieces, backend, vocab_size, heldout_tokens, sequence_length, cache_dir)


def from_tokens(
    name_key: str,
    make: Callable[[], Iterable[np.ndarray]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    heldout_tokens: int = 262_144,
    sequence_length: int = 512,
    cache_dir: Path | None = None,
) -> Tokens:
    """Cache the arrays of token ids that `make` yields, as they are, under `name_key` and the tokenizer.

    `name_key` must name everything that decides the tokens; `make` is called only if nothing is cached under it. The
    first arrays are held out until there are `heldout_tokens`, or the last 2 % where that is too much, as in `prepare`.
    Bytes are those of the decoded text without special tokens.
    """
    backend = _backend(tokenizer)

    def pieces() -> Iterator[tuple[bool, np.ndarray, int]]:
        held = 0
        for array in make():
            ids = np.asarray(array).reshape(-1)
            held_out = held < heldout_tokens
            held += len(ids) if held_out else 0
            yield held_out, ids, _decoded_bytes(backend, ids)

    key = _key("tokens", [RULE, name_key, heldout_tokens], backend)
    return _cached(key, pieces, backend, vocab_size, heldout_tokens, sequence_length, cache_dir)


def _cached(
    key: str,
    pieces: Callable[[], Iterable[tuple[bool, np.ndarray, int]]],
    backend: Tokenizer,
    vocab_size: int,
    heldout_tokens: int,
    sequence_length: int,
    cache_dir: Path | None,
) -> Tokens:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = TokenFile((cache_dir or caches / "trilobit" / "tokens") / key[:32])
    reused = is_whole(file.directory)
    if not reused:
        try:
            file.write(pieces(), vocab_size, heldout_tokens)
        except OutputError:
            if not is_whole(file.directory):  # else another process wrote the same at the same time
                raise
    tokens, meta = file.read()
    _require_vocabulary(meta["largest"], vocab_size)
    window, held, total_bytes = sequence_length + 1, meta["heldout_tokens"], meta["train_bytes"] + meta["heldout_bytes"]
    heldout_bytes, how = meta["heldout_bytes"], "held out by document"
    if held < window or len(tokens) - held < max(window, held):
        if len(tokens) < 2 * window:
            raise DataError(
                f"there are {len(tokens):,} tokens, but training and held-out text need a window of "
                f"{window:,} each: give more text or a shorter --sequence-length."
            )
        held = max(window, min(heldout_tokens, int(len(tokens) * corpus.HELD_OUT_FRACTION)))
        heldout_bytes = min(total_bytes, _decoded_bytes(backend, tokens[-held:]))
        how = "held out at the end"
    train = len(tokens) - held
    description = (
        f"{meta['documents'] - meta['left_out']:,} documents, {train:,} training tokens, {held:,} {how}, "
        f"{total_bytes / len(tokens):.2f} bytes each, {'reused from' if reused else 'kept in'} {file.directory}"
    )
    return Tokens(tokens[:train], tokens[train:], total_bytes - heldout_bytes, heldout_bytes, description, key, file.sha256())


def _key(kind: str, options: list[Any], backend: Tokenizer) -> str:
    return hashlib.sha256(json.dumps([kind, *options, backend.to_str()]).encode()).hexdigest()


def _require_vocabulary(largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ModelError(
            f"the tokenizer does not match the model's vocabulary: it gives token {largest}, but the model has "
            f"{vocab_size:,} entries. Use the tokenizer that belongs to the model."
        )


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer, without truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"{type(tokenizer).__name__} is not a fast tokenizer: the folder needs a tokenizer.json.")
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _decoded_bytes(backend: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of the text of `ids`, up to a character at either end."""
    return len(backend.decode(ids.tolist(), skip_special_tokens=True).encode())
