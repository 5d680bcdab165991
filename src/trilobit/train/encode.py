"""Documents to tokens, in batches.

Where the tokenizer allows it they are encoded by distinct words (words.py), many times as fast as by the library on a core.
One thread encodes while the next batch is read and the last one written; the library encodes new words on all cores.
Long documents are cut where that provably changes nothing, because a 1 GB file is one document.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tokenizers import Tokenizer

from trilobit import corpus
from trilobit.train.words import WordEncoder

BATCH_CHARACTERS = 1 << 20
CUT_CHARACTERS = 1 << 14

_Batch = list[tuple[str, corpus.Document | None]]


def encode_documents(
    documents: Iterable[corpus.Document], backend: Tokenizer, end: int
) -> Iterator[tuple[corpus.Document, np.ndarray]]:
    """Each document and its tokens as uint32, `end` last. Holds few batches of texts and tokens at a time."""
    batches: deque[_Batch] = deque()  # that are being encoded

    def texts() -> Iterator[list[str]]:
        for batch in _batches(documents, _cut if _cuts_are_safe(backend) else lambda text: [text]):
            batches.append(batch)
            yield [text for text, _ in batch]

    parts: list[np.ndarray] = []
    for encoded in _encode(texts(), backend):
        for ids, (_, document) in zip(encoded, batches.popleft(), strict=True):
            parts.append(ids)
            if document is not None:
                yield document, np.concatenate([*parts, np.array([end], dtype=np.uint32)])
                parts = []


def _encode(batches: Iterable[list[str]], backend: Tokenizer) -> Iterator[list[np.ndarray]]:
    """The ids of each batch, in order; one batch ahead of the reader."""

    def whole(texts: list[str]) -> list[np.ndarray]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    words = WordEncoder.of(backend)
    encode = whole if words is None else words.encode
    with ThreadPoolExecutor(1) as thread:
        ahead: Future[list[np.ndarray]] | None = None
        for texts in batches:
            before, ahead = ahead, thread.submit(encode, texts)
            if before is not None:
                yield before.result()
        if ahead is not None:
            yield ahead.result()


def _cuts_are_safe(backend: Tokenizer) -> bool:
    """True if cutting a text between a letter and the blank after it is sure to leave its tokens as they were.

    It is for GPT-2's pre-tokenizer (ByteLevel, also after Digits), with no or NFC normalisation. Its pattern,
    's|'t|…| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+, has no branch with a blank after anything else,
    so in the whole text a match ends at the cut too; it never looks back, so what follows matches alike; and only a run
    of blanks looks ahead, at the one character after it, which lies before the cut. BPE works inside matches. Left to
    exclude are added tokens that reach across: those with blanks inside, or that swallow the blanks after them.
    """
    added = json.loads(backend.to_str())["added_tokens"]
    reaching = any(token["rstrip"] or re.search(r"\s", token["content"]) for token in added)
    return WordEncoder.of(backend) is not None and not reaching


def _cut(text: str) -> list[str]:
    parts, start = [], 0
    blank = re.compile(r"[A-Za-z](?=[ \n])")
    while len(text) - start > CUT_CHARACTERS and (found := blank.search(text, start + CUT_CHARACTERS)):
        parts.append(text[start : found.end()])
        start = found.end()
    return [*parts, text[start:]]


def _batches(documents: Iterable[corpus.Document], cut: Callable[[str], list[str]]) -> Iterator[_Batch]:
    """Texts to encode together, each with the document that ends with it, or None if the document goes on."""
    batch: _Batch = []
    characters = 0
    for document in documents:
        *firsts, last = cut(document.text)
        for text, ends in [*((first, None) for first in firsts), (last, document)]:
            batch.append((text, ends))
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch
