"""Encoding by words: the library's tokens of whole texts are the oracle."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from train.byte_level import SAFE, WORDS, byte_level, make_tokenizer, with_added, with_normalizer
from trilobit.train import words as words_module
from trilobit.train.words import WordEncoder

NUMBERS = pre_tokenizers.Digits(individual_digits=False)
TOKENIZERS = [*SAFE, make_tokenizer(pre_tokenizers.Sequence([NUMBERS, byte_level()]))]
NASTY = [
    *"atsl' \n\t\r.1९Ⅷ²éǅ\u0301\u00a0\u3000\x1c\x85\u200b\u2028中文😀\U000e0041\U0001f1e9", 
    "the", "they", "  ", "'ll", "'S", "<|end|>",
]  # fmt: skip


def oracle(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(NASTY), max_size=40), max_size=5), st.text(max_size=30))
def test_words_change_no_token(texts: list[list[str]], more: str) -> None:
    """Any texts have the library's tokens, in one call or the next, for every tokenizer that goes by words."""
    for tokenizer in TOKENIZERS:
        encoder = WordEncoder.of(tokenizer)
        assert encoder is not None
        for batch in (["".join(text) for text in texts], [more, more + more]):
            for text, ids in zip(batch, encoder.encode(batch), strict=True):
                assert ids.tolist() == oracle(tokenizer, text), text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=str.split("plain digits nfc added numbers"))
def test_every_kind_of_character_is_cut_as_the_library_cuts(tokenizer: Tokenizer) -> None:
    """Code points from all over Unicode, between letters, numbers, blanks and signs, have the library's tokens."""
    encoder = WordEncoder.of(tokenizer)
    assert encoder is not None
    points = [*range(0x3100), *range(0x3100, sys.maxunicode, 97)]
    texts = [f"a{c}b {c}{c}1{c}!{c} {c}  {c}\n" for c in map(chr, points) if not "\ud800" <= c <= "\udfff"]
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, encoder.encode(texts), expected, strict=True):
        assert ids.tolist() == encoding.ids, text


def test_characters_of_another_kind_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the regular expression takes a character for another kind than the library does, the library encodes the text."""
    encoder = WordEncoder(SAFE[0], words_module.WORDS.replace(r"\p{L}", "[A-Za-z]"))  # é is then no letter
    for text in ("caf\u00e9 the", "the end", "\u00e9\u00e9"):
        assert encoder.encode([text])[0].tolist() == oracle(SAFE[0], text)
    assert "\u00e9" not in encoder._agreed


def test_the_table_forgets_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is full is emptied, and no token changes."""
    monkeypatch.setattr(words_module, "MOST_WORDS", 5)
    encoder = WordEncoder.of(SAFE[0])
    assert encoder is not None
    for text in [WORDS, WORDS[::-1], WORDS * 2]:
        assert encoder.encode([text])[0].tolist() == oracle(SAFE[0], text)
        assert len(encoder._rows) <= 60


def test_nothing_is_a_batch_too() -> None:
    """No texts, and empty ones, give no tokens, as uint32."""
    encoder = WordEncoder.of(SAFE[0])
    assert encoder is not None
    assert encoder.encode([]) == []
    assert [(ids.tolist(), ids.dtype) for ids in encoder.encode(["", ""])] == [([], np.uint32)] * 2


def test_other_tokenizers_do_not_go_by_words() -> None:
    """A pre-tokenizer, model or normaliser that this was not made for gives None."""
    others = [
        make_tokenizer(byte_level(add_prefix_space=True)),
        make_tokenizer(byte_level(use_regex=False)),
        make_tokenizer(pre_tokenizers.Metaspace()),
        make_tokenizer(pre_tokenizers.Sequence([])),
        make_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level()])),
        with_normalizer(make_tokenizer(byte_level()), normalizers.NFKC()),
        Tokenizer(models.BPE()),
        Tokenizer(models.WordLevel()),
    ]
    dropout = make_tokenizer(byte_level())
    dropout.model.dropout = 0.1
    assert [WordEncoder.of(tokenizer) for tokenizer in [*others, dropout]] == [None] * 9


def test_added_tokens_are_found_by_the_library() -> None:
    """A text that contains an added token, normalised or not, has the library's tokens."""
    tokenizer = with_normalizer(make_tokenizer(byte_level()), normalizers.NFC())
    for content in ("e\u0301nd", "the end", "1984"):
        with_added(tokenizer, AddedToken(content, normalized=True))
    encoder = WordEncoder.of(tokenizer)
    assert encoder is not None
    for text in ("x e\u0301nd y", "x \u00e9nd y", "in the end", "1984!", "198 4"):
        assert encoder.encode([text])[0].tolist() == oracle(tokenizer, text), text
