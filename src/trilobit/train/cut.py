"""Where the words of GPT-2's pre-tokenizer begin, for a million characters at once.

Its pattern, 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+, knows four kinds of characters,
and a word begins

  1. where the kind changes;
  2. at the last of a run of blanks that something follows in the same text (\\s+(?!\\S) leaves it over);
  3. but not after that last blank if it is a space (" ?" takes it in);
  4. after a contraction, and not inside it, if its apostrophe begins a word.

Where numbers were cut out first (the pre-tokenizer Digits), a text ends before each number and another begins after it:
then numbers count as nothing in rule 2, and where digits stand alone, a word begins at every one.

Of which kind a character is depends on the version of Unicode, so the library is asked: a character is of the kind under
which these rules cut a probe, with every pair of kinds in it, as the library does. If there is none, it is foreign.
"""

from enum import IntEnum
from typing import Literal

import numpy as np
from tokenizers.pre_tokenizers import PreTokenizer

Numbers = Literal["joined", "runs", "single"]  # no Digits before ByteLevel; Digits(individual_digits=False); …=True


class Kind(IntEnum):
    UNKNOWN = 0
    LETTER = 1
    NUMBER = 2
    OTHER = 3
    BLANK = 4
    END = 5  # of a text
    FOREIGN = 6


CODE_POINTS = 0x110000
PROBE = "a?1?!? ?? ?a\0"  # ? is the character in question
CHARACTER, END = (np.array([c == mark for c in PROBE]) for mark in "?\0")
PROBE_KINDS = np.array([{"a": Kind.LETTER, "1": Kind.NUMBER, "!": Kind.OTHER, " ": Kind.BLANK}.get(c, Kind.END) for c in PROBE])


def word_begins(codes: np.ndarray, kinds: np.ndarray, numbers: Numbers) -> np.ndarray:
    """Bool [C]: whether a word begins at this character. An END is a word.

    codes: [C] code points of texts, each with one more character (any but those in a contraction) at its end.
    kinds: uint8 [C] the kind of each, END at the ends of texts.
    """
    begins = np.ones(len(codes), bool)
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    begins |= kinds == Kind.END
    if numbers == "single":
        begins |= kinds == Kind.NUMBER
    follows = (kinds == Kind.LETTER) | (kinds == Kind.OTHER)
    if numbers == "joined":
        follows |= kinds == Kind.NUMBER
    last = (kinds[:-1] == Kind.BLANK) & follows[1:]
    begins[:-1] |= last
    begins[1:] &= ~(last & (codes[:-1] == ord(" ")))

    marks = np.flatnonzero((codes == ord("'")) & begins)
    first, second = (np.take(codes, marks + after, mode="clip") for after in (1, 2))
    one = np.isin(first, [*map(ord, "stmd")])
    two = np.zeros(len(marks), bool)
    for pair in ("re", "ve", "ll"):
        two |= (first == ord(pair[0])) & (second == ord(pair[1]))
    begins[marks[one | two] + 1] = False
    begins[marks[one] + 2] = True
    begins[marks[two] + 3] = True
    return begins


class Kinds:
    """The kind of every character met so far, as the library's pre-tokenizer takes it."""

    def __init__(self, cut: PreTokenizer, numbers: Numbers):
        self._cut = cut
        self._numbers: Numbers = numbers
        self._table = np.full(CODE_POINTS, Kind.UNKNOWN, np.uint8)
        self.foreign: set[str] = set()

    def of(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [C], the kinds of code points [C]."""
        kinds = self._table[codes]
        if not kinds.all():
            self._ask(np.unique(codes[kinds == Kind.UNKNOWN]))
            kinds = self._table[codes]
        return kinds

    def _ask(self, new: np.ndarray) -> None:
        probes = [PROBE.replace("?", chr(code)) for code in new]
        codes = np.array([[*map(ord, probe)] for probe in probes])
        theirs = np.tile(END, (len(new), 1))
        for row, probe in zip(theirs, probes, strict=True):
            row[[start for _, (start, _) in self._cut.pre_tokenize_str(probe[:-1])]] = True
        self._table[new] = Kind.FOREIGN
        for kind in (Kind.LETTER, Kind.NUMBER, Kind.OTHER, Kind.BLANK):
            guess = np.tile(np.where(CHARACTER, kind, PROBE_KINDS), (len(new), 1))
            ours = word_begins(codes.ravel(), guess.ravel(), self._numbers).reshape(codes.shape)
            self._table[new[(ours == theirs).all(axis=1)]] = kind
        self.foreign.update(map(chr, new[self._table[new] == Kind.FOREIGN]))
