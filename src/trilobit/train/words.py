"""Byte-level BPE with every distinct word encoded once: the tokens of the library, at several times its speed on a core.

GPT-2's pre-tokenizer cuts a text into words that BPE never reaches across. The library carries offsets and alignments
through every one of them; training needs the ids alone. So: cut (cut.py), look each word up, let the library encode those
that are new, gather; all but the new words without a Python object a word.

A word of up to 15 bytes is two integers, its bytes and its length: equal numbers are equal words. Those that were met
before are found in a direct-mapped cache, hash of the word → row of the table, which is right if the row holds the word.
What is not found there (new words, long words, words whose place another one took) goes through a dict.

Equal by construction where `of` finds it so: a word has the same tokens alone as in its text. Texts that contain an added
token, are not normalised, or have a character that cut.py calls foreign go to the library whole.
"""

import json
import unicodedata
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from trilobit.train.cut import Kind, Kinds, Numbers, word_begins

MOST_WORDS = 1 << 19  # remembered at once (some 100 MB); then all are forgotten
PLACE_BITS = 20  # of a place in the cache
KEY_BYTES = 15
# [16, 2]: of two little-endian integers of 8 bytes each, the bits that belong to the first n bytes, n = 0 … 15
KEEP = np.array([divmod((1 << 8 * n) - 1, 1 << 64)[::-1] for n in range(KEY_BYTES + 1)], np.uint64)
LEARNED_TOGETHER = 128  # enough that Python's part is small, few enough to share among cores


class _Rows(dict[bytes, int]):
    """word in UTF-8 → row of the table, from 1; a new word gets the next one."""

    def __missing__(self, word: bytes) -> int:
        row = self[word] = len(self) + 1
        return row


class WordEncoder:
    """Texts to ids. The same ids as `backend.encode(text, add_special_tokens=False)`."""

    def __init__(self, backend: Tokenizer, spec: dict[str, Any], numbers: Numbers):
        assert backend.pre_tokenizer is not None
        self._backend = backend
        self._numbers: Numbers = numbers
        self._kinds = Kinds(backend.pre_tokenizer, numbers)
        self._normalized = spec["normalizer"] is not None
        added = [token["content"] for token in spec["added_tokens"]]
        self._added = {*added, *(unicodedata.normalize("NFC", content) for content in added)}
        self._model = Tokenizer(backend.model)  # of words alone
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._forget()

    @classmethod
    def of(cls, backend: Tokenizer) -> "WordEncoder | None":
        """The encoder of a BPE behind GPT-2's pre-tokenizer (ByteLevel, also after Digits); None for any other."""
        spec = json.loads(backend.to_str())
        steps = spec["pre_tokenizer"] or {}
        *before, last = steps.get("pretokenizers", [steps]) or [{}]
        byte_level = last.get("type") == "ByteLevel" and last["use_regex"] and not last["add_prefix_space"]
        plain = spec["model"]["type"] == "BPE" and not spec["model"]["dropout"]
        if not (byte_level and plain and (spec["normalizer"] or {"type": "NFC"})["type"] == "NFC"):
            return None
        if not before:
            return cls(backend, spec, "joined")
        if len(before) == 1 and before[0]["type"] == "Digits":
            return cls(backend, spec, "single" if before[0]["individual_digits"] else "runs")
        return None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32."""
        fits = self._fits(texts)
        mine = [text for text, fit in zip(texts, fits, strict=True) if fit]
        joined = "".join(text + "\0" for text in mine)
        ends = np.cumsum([len(text) + 1 for text in mine], dtype=np.int64) - 1
        codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        foreign = len(self._kinds.foreign)
        kinds = self._kinds.of(codes)
        if len(self._kinds.foreign) > foreign:
            return self.encode(texts)  # without the texts that hold it
        kinds[ends] = Kind.END
        starts = np.flatnonzero(word_begins(codes, kinds, self._numbers))
        end_words = np.searchsorted(starts, ends)

        utf8 = joined.encode()
        if len(utf8) > len(codes):  # the place of each character is that of its first byte
            starts = np.flatnonzero((np.frombuffer(utf8, np.uint8) & 0xC0) != 0x80)[starts]
        rows = self._look_up(utf8, starts)
        lengths = self._lengths[rows]
        lengths[end_words] = 0
        to = np.cumsum(lengths)
        total = int(to[-1]) if len(to) else 0
        ids = self._ids[np.arange(total) + np.repeat(self._starts[rows] - (to - lengths), lengths)]
        own = iter(ids[a:b] for a, b in pairwise([0, *to[end_words].tolist()]))
        rest = [text for text, fit in zip(texts, fits, strict=True) if not fit]
        others = iter(self._backend.encode_batch_fast(rest, add_special_tokens=False))
        return [next(own) if fit else np.array(next(others).ids, dtype=np.uint32) for fit in fits]

    def _fits(self, texts: Sequence[str]) -> list[bool]:
        """Which texts can be encoded word by word."""
        everything = "\0".join(texts)
        reaching = [part for part in chain(self._added, self._kinds.foreign) if part in everything]
        normal = not self._normalized or unicodedata.is_normalized("NFC", everything)
        return [
            (normal or unicodedata.is_normalized("NFC", text)) and not any(part in text for part in reaching) for text in texts
        ]

    def _look_up(self, utf8: bytes, starts: np.ndarray) -> np.ndarray:
        """The row of each word; words that are new are learned. starts: [W] first bytes, the first 0. Rows: int64 [W]."""
        if len(self._rows) > MOST_WORDS:
            self._forget()
        sizes = np.diff(starts, append=len(utf8))
        short = sizes <= KEY_BYTES
        eights = np.ndarray(len(utf8) + 9, "<u8", utf8 + bytes(16), strides=(1,))  # [i] is made of the bytes from i to i + 7
        keep = KEEP[np.minimum(sizes, KEY_BYTES)]
        low = eights[starts] & keep[:, 0]
        high = eights[starts + 8] & keep[:, 1] | sizes.astype(np.uint64) << np.uint64(56)
        mixed = (low ^ high * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xD6E8FEB86659FD93)  # odd, half of the bits set
        places = mixed >> np.uint64(64 - PLACE_BITS)
        rows = self._cache[places]
        missed = np.flatnonzero((self._low[rows] != low) | (self._high[rows] != high) | ~short)
        if len(missed):
            firsts = starts[missed]
            words = [utf8[a:b] for a, b in zip(firsts.tolist(), (firsts + sizes[missed]).tolist(), strict=True)]
            rows[missed] = np.fromiter(map(self._rows.__getitem__, words), np.int64, len(words))
            self._learn()
            again = missed[short[missed]]
            self._cache[places[again]] = rows[again]
            self._low[rows[again]] = low[again]
            self._high[rows[again]] = high[again]
        return rows

    def _forget(self) -> None:
        self._rows = _Rows()
        self._cache = np.zeros(1 << PLACE_BITS, np.int64)
        self._ids = np.empty(0, np.uint32)
        # by row; row 0 is no word
        self._low, self._high = np.zeros((2, 1), np.uint64)
        self._starts, self._lengths = np.zeros((2, 1), np.int64)

    def _learn(self) -> None:
        """Encode the words that were new, and put their ids in the table."""
        new = [word.decode() for word in islice(self._rows, len(self._starts) - 1, None)]
        parts = [new[first : first + LEARNED_TOGETHER] for first in range(0, len(new), LEARNED_TOGETHER)]
        encoded = self._model.encode_batch(parts, is_pretokenized=True, add_special_tokens=False)
        counts = [
            np.bincount(np.array(found.word_ids, np.int64), minlength=len(words))
            for found, words in zip(encoded, parts, strict=True)
        ]
        lengths = np.concatenate([np.empty(0, np.int64), *counts])
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        self._ids = np.concatenate([self._ids, *(np.array(found.ids, np.uint32) for found in encoded)])
        self._starts = np.concatenate([self._starts, starts])
        self._lengths = np.concatenate([self._lengths, lengths])
        keys = np.zeros(len(new), np.uint64)  # of long words; those of short ones are written where they are used
        self._low, self._high = np.concatenate([self._low, keys]), np.concatenate([self._high, keys])
