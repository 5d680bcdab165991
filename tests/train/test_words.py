"""Encoding by words: the library's tokens of whole texts are the oracle."""

import json
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
    *"atsl' \n\t\r.1९Ⅷ²éǅ\u0301\u00a0\u3000\x1c\x85\u200b\u2028中文😀𝔸𝟙\U000e0041\U0001f1e9\0", 
    "the", "they", "  ", "'ll", "'re", "'d", "'S", "'lé", "<|end|>", "a" * 13, "é" * 8,
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


def test_foreign_characters_go_to_the_library() -> None:
    """Texts with a character that the rules do not fit, new or known, alone or among others, have the library's tokens."""
    tokenizer = make_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Split("\u00e9", "merged_with_next"), byte_level()]))
    assert WordEncoder.of(tokenizer) is None
    encoder = WordEncoder(tokenizer, json.loads(tokenizer.to_str()), "joined")
    for batch in (["caf\u00e9 the", "the end"], ["\u00e9\u00e9"], ["the", "end\u00e9s", ""]):
        assert [ids.tolist() for ids in encoder.encode(batch)] == [oracle(tokenizer, text) for text in batch]
    assert encoder._kinds.foreign == {"\u00e9"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "the", "\0", "!", "é", "文", "𝔸"]), st.integers(1, 20)), max_size=30))
def test_words_of_any_length_are_told_apart(words: list[tuple[str, int]]) -> None:
    """Words that differ in length alone, in zero bytes, or after the fifteenth byte, share no tokens, even where they
    share a place in the cache."""
    batch = [part * count + ending for part, count in words for ending in ("", "\0", "a", "b")]
    batch += ["!", "!" + 256 * "\0"]  # 1 and 257 bytes: the same length in one byte
    for bits in (20, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(words_module, "PLACE_BITS", bits)
            encoder = WordEncoder.of(SAFE[0])
            assert encoder is not None
            for _ in range(2):
                assert [ids.tolist() for ids in encoder.encode(batch)] == [oracle(SAFE[0], text) for text in batch]


def test_bytes_without_a_token_change_no_word() -> None:
    """Where the vocabulary lacks bytes and the library drops them, each word keeps its own tokens."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2}, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = byte_level()
    encoder = WordEncoder.of(tokenizer)
    assert encoder is not None
    batch = ["a b a", "bbb", "b a ab ba", "", "a é a", "éé"]
    assert [ids.tolist() for ids in encoder.encode(batch)] == [oracle(tokenizer, text) for text in batch]


def test_the_table_forgets_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is full is emptied, and no token changes."""
    monkeypatch.setattr(words_module, "MOST_WORDS", 5)
    encoder = WordEncoder.of(SAFE[0])
    assert encoder is not None
    for text in [WORDS, WORDS[::-1], WORDS * 2]:
        assert encoder.encode([text])[0].tolist() == oracle(SAFE[0], text)
        assert len(encoder._rows) == len(encoder._lengths) - 1 <= 60


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
