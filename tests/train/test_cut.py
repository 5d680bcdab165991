"""Where words begin: the library's pre-tokenizer is the oracle."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from train.byte_level import byte_level
from trilobit.train.cut import Kind, Kinds, Numbers, word_begins

CASES: list[tuple[Numbers, PreTokenizer]] = [
    ("joined", byte_level()),
    ("runs", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level()])),
    ("single", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
]
NAMES = [numbers for numbers, _ in CASES]
# letters that contractions are made of and others, numbers, signs, combining marks, blanks; of one to four bytes
CHARACTERS = "'stmdrevlaLé中𝔸 1२Ⅷ𝟙 .!\u0301\u200b😀 \n\t\r\x1c\x85\u00a0\u2028\u3000\0"


def cut(texts: list[str], kinds: Kinds, numbers: Numbers) -> list[list[str]]:
    """The words of each text, all texts cut at once."""
    joined = "".join(text + "\0" for text in texts)
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64) - 1
    codes = np.array([*map(ord, joined)], np.uint32)
    found = kinds.of(codes)
    found[ends] = Kind.END
    starts = np.flatnonzero(word_begins(codes, found, numbers)).tolist()
    words = [joined[a:b] for a, b in pairwise([*starts, len(joined)])]
    places = np.searchsorted(starts, ends).tolist()
    assert [words[place] for place in places] == ["\0"] * len(texts), "each end is a word"
    return [words[a:b] for a, b in zip([0, *(place + 1 for place in places)], places, strict=False)]


def oracle(text: str, pre_tokenizer: PreTokenizer) -> list[str]:
    return [text[a:b] for _, (a, b) in pre_tokenizer.pre_tokenize_str(text)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(CHARACTERS, max_size=40), st.text(max_size=20)), max_size=6))
def test_words_begin_where_the_library_begins_them(texts: list[str]) -> None:
    """Texts of any characters, cut together, have the library's words, with numbers joined to blanks, in runs or single."""
    for numbers, pre_tokenizer in CASES:
        found = cut(texts, Kinds(pre_tokenizer, numbers), numbers)
        assert found == [oracle(text, pre_tokenizer) for text in texts]


@pytest.mark.parametrize(("numbers", "pre_tokenizer"), CASES, ids=NAMES)
def test_every_short_text_is_cut_as_the_library_cuts(numbers: Numbers, pre_tokenizer: PreTokenizer) -> None:
    """All texts of up to four characters that decide between rules, cut together, have the library's words."""
    texts = ["".join(text) for size in range(5) for text in product("'srela1! \n", repeat=size)]
    found = cut(texts, Kinds(pre_tokenizer, numbers), numbers)
    for text, words in zip(texts, found, strict=True):
        assert words == oracle(text, pre_tokenizer), text


@pytest.mark.parametrize(("numbers", "pre_tokenizer"), CASES, ids=NAMES)
def test_kinds_are_those_of_the_pattern(numbers: Numbers, pre_tokenizer: PreTokenizer) -> None:
    """Well-known characters, asked about together or one by one, are of the kind that everyone takes them for."""
    known = {"sLé中𝔸ǅ": Kind.LETTER, "1२Ⅷ𝟙²": Kind.NUMBER, "'.\u0301\u200b😀\0": Kind.OTHER, " \n\x85\u3000": Kind.BLANK}
    together, single = Kinds(pre_tokenizer, numbers), Kinds(pre_tokenizer, numbers)
    together.of(np.array([ord(c) for characters in known for c in characters], np.uint32))
    for characters, kind in known.items():
        codes = np.array([*map(ord, characters)], np.uint32)
        assert together.of(codes).tolist() == [kind] * len(codes)
        assert [single.of(codes[i : i + 1]).item() for i in range(len(codes))] == [kind] * len(codes)
    assert not together.foreign and not single.foreign


def test_a_character_that_fits_no_rule_is_foreign() -> None:
    """Where the library cuts around a character as none of the four kinds would, it is called foreign, and no other is."""
    kinds = Kinds(pre_tokenizers.Sequence([pre_tokenizers.Split("x", "merged_with_next"), byte_level()]), "joined")
    assert kinds.of(np.array([*map(ord, "wxy")], np.uint32)).tolist() == [Kind.LETTER, Kind.FOREIGN, Kind.LETTER]
    assert kinds.foreign == {"x"}
