"""Byte-level BPE with every distinct word encoded once: the tokens of the library, at several times its speed on a core.

GPT-2's pre-tokenizer cuts a text into words that BPE never reaches across. The library carries offsets and alignments
through every one of them; training needs the ids alone. So: cut with a regular expression, look each word up, let the
library encode those that are new, gather.

Equal by construction where `of` finds it so: a word has the same tokens alone as in its text. Two things could differ and
are asked rather than assumed: which characters are letters, numbers or blanks (Unicode versions differ) is compared with
the library's pre-tokenizer for every character seen; texts that contain an added token, or are not normalised, go to the
library whole.
"""

import json
import unicodedata
from collections.abc import Sequence
from itertools import chain, islice, pairwise

import numpy as np
import regex
from tokenizers import Tokenizer

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# GPT-2's, with the commonest kinds first: letters and numbers cannot begin a contraction.
WORDS = rf" ?\p{{L}}+| ?\p{{N}}+|{CONTRACTIONS}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
# Where numbers were cut out first (the pre-tokenizer Digits), they stand alone, and a text ends before each.
WORDS_AND_DIGITS = rf" ?\p{{L}}+|\p{{N}}|{CONTRACTIONS}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
WORDS_AND_NUMBERS = WORDS_AND_DIGITS.replace(r"|\p{N}|", r"|\p{N}+|")
MOST_WORDS = 1 << 19  # remembered at once (some 100 MB); then all are forgotten


class _Rows(dict[str, int]):
    """word → row of the table; a new word gets the next one."""

    def __missing__(self, word: str) -> int:
        row = self[word] = len(self)
        return row


class WordEncoder:
    """Texts to ids. The same ids as `backend.encode(text, add_special_tokens=False)`."""

    def __init__(self, backend: Tokenizer, pattern: str):
        self._backend = backend
        self._split = regex.compile(pattern).findall
        spec = json.loads(backend.to_str())
        self._normalized = spec["normalizer"] is not None
        added = [token["content"] for token in spec["added_tokens"]]
        self._added = {*added, *(unicodedata.normalize("NFC", content) for content in added)}
        self._agreed: set[str] = set()
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
            return cls(backend, WORDS)
        if len(before) == 1 and before[0]["type"] == "Digits":
            return cls(backend, WORDS_AND_DIGITS if before[0]["individual_digits"] else WORDS_AND_NUMBERS)
        return None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32."""
        mine = [self._fits(text) for text in texts]
        found = [self._split(text) for text, own in zip(texts, mine, strict=True) if own]
        if len(self._rows) > MOST_WORDS:
            self._forget()
        counts = [len(words) for words in found]
        rows = np.fromiter(map(self._rows.__getitem__, chain.from_iterable(found)), np.int64, sum(counts))
        self._learn()
        lengths = self._lengths[rows]
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self._starts[rows] - (ends - lengths), lengths)
        ids = self._ids[places]
        bounds = np.concatenate([[0], ends])[np.cumsum([0, *counts])]
        own = iter(ids[a:b] for a, b in pairwise(bounds))
        others = iter(
            self._backend.encode_batch_fast(
                [text for text, own in zip(texts, mine, strict=True) if not own], add_special_tokens=False
            )
        )
        return [next(own) if is_own else np.array(next(others).ids, dtype=np.uint32) for is_own in mine]

    def _fits(self, text: str) -> bool:
        if self._normalized and not unicodedata.is_normalized("NFC", text):
            return False
        if any(token in text for token in self._added):
            return False
        return text.isascii() or self._agrees(set(text) - self._agreed)

    def _agrees(self, characters: set[str]) -> bool:
        """Whether the library's pre-tokenizer takes each of these for the same kind (letter, number, blank, other)."""
        cut = self._backend.pre_tokenizer
        assert cut is not None
        for character in sorted(characters):
            probe = f"a{character}1{character}!{character} {character}{character} {character}a"
            # its words are in an alphabet of one character a byte
            theirs = [len(word) for word, _ in cut.pre_tokenize_str(probe)]
            if theirs != [len(word.encode("utf-8", "surrogatepass")) for word in self._split(probe)]:
                return False
            self._agreed.add(character)
        return True

    def _forget(self) -> None:
        self._rows = _Rows()
        self._ids = np.empty(0, np.uint32)
        self._starts = np.empty(0, np.int64)
        self._lengths = np.empty(0, np.int64)

    def _learn(self) -> None:
        """Encode the words that were new, and put their ids in the table."""
        new = list(islice(self._rows, len(self._starts), None))
        if not new:
            return
        encoded = [encoding.ids for encoding in self._backend.encode_batch_fast(new, add_special_tokens=False)]
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        first = len(self._ids)
        self._ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(encoded), np.uint32, int(lengths.sum()))])
        self._starts = np.concatenate([self._starts, first + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
