"""Documents to tokens, in batches.

The library encodes the texts of a batch in parallel, so long documents are cut where that provably changes nothing: a
1 GB file is one document. On few cores encoding by distinct words (words.py) is faster, where the tokenizer allows it.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from trilobit import corpus
from trilobit.train.words import WordEncoder

BATCH_CHARACTERS = 1 << 21
CUT_CHARACTERS = 1 << 14
CORES_FOR_LIBRARY = 8  # from which on the library, at some 2 MB/s a core, overtakes one core of words.py


def encode_documents(
    documents: Iterable[corpus.Document], backend: Tokenizer, end: int
) -> Iterator[tuple[corpus.Document, np.ndarray]]:
    """Each document and its tokens as uint32, `end` last. Holds one batch of texts and tokens at a time."""
    words = WordEncoder.of(backend) if (os.cpu_count() or 1) < CORES_FOR_LIBRARY else None
    parts: list[np.ndarray] = []
    for batch in _batches(documents, _cut if _cuts_are_safe(backend) else lambda text: [text]):
        texts = [text for text, _ in batch]
        if words is not None:
            encoded = words.encode(texts)
        else:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            encoded = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        for ids, (_, document) in zip(encoded, batch, strict=True):
            parts.append(ids)
            if document is not None:
                yield document, np.concatenate([*parts, np.array([end], dtype=np.uint32)])
                parts = []


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


def _batches(
    documents: Iterable[corpus.Document], cut: Callable[[str], list[str]]
) -> Iterator[list[tuple[str, corpus.Document | None]]]:
    """Texts to encode together, each with the document that ends with it, or None if the document goes on."""
    batch: list[tuple[str, corpus.Document | None]] = []
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
