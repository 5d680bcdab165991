"""Cutting long documents, and encoding by words: the tokens of whole texts through the library are the oracle."""

import threading
from collections.abc import Generator, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from train.byte_level import SAFE, WORDS, byte_level, make_tokenizer, with_added, with_normalizer
from trilobit.corpus import Document
from trilobit.train import encode as encode_module
from trilobit.train.encode import encode_documents


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*"atsl' \n\t\r.19é\u0301\u00a0\u3000\x1c", "the", "they", "  ", "'ll"]), max_size=60))
def test_cuts_change_no_token(pieces: list[str]) -> None:
    """Where cuts are called safe, the parts are the text, and their tokens are the tokens of the whole text."""
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "CUT_CHARACTERS", 2)
        parts = encode_module._cut(text)
    assert "".join(parts) == text
    for tokenizer in SAFE:
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        encoded = tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        assert [token for part in encoded for token in part.ids] == whole


def test_cuts_are_made_only_where_they_are_proven() -> None:
    """Every other kind of tokenizer sees documents whole; one of them shows that a cut would change its tokens."""
    assert all(map(encode_module._cuts_are_safe, SAFE))
    prefixing = make_tokenizer(byte_level(add_prefix_space=True))
    swallowing = with_added(make_tokenizer(byte_level()), AddedToken("end", rstrip=True))
    unsafe = [
        prefixing,
        swallowing,
        with_added(make_tokenizer(byte_level()), AddedToken("the end")),
        make_tokenizer(byte_level(use_regex=False)),
        make_tokenizer(pre_tokenizers.Metaspace()),
        make_tokenizer(pre_tokenizers.Sequence([])),
        with_normalizer(make_tokenizer(byte_level()), normalizers.NFKC()),
        Tokenizer(models.BPE()),
    ]
    assert not any(map(encode_module._cuts_are_safe, unsafe))
    for tokenizer, parts in ((prefixing, ["the", "\nend"]), (swallowing, ["the end", " end"])):
        cut = [token for part in parts for token in tokenizer.encode(part).ids]
        assert cut != tokenizer.encode("".join(parts)).ids


@pytest.mark.parametrize("tokenizer", [SAFE[0], make_tokenizer(pre_tokenizers.Metaspace())])
def test_documents_come_back_with_their_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By words or not, each document has the library's tokens and an end."""
    monkeypatch.setattr(encode_module, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(encode_module, "CUT_CHARACTERS", 20)
    texts = [WORDS * 3, "", "they", WORDS[:40], *[WORDS[i:] for i in range(20)]]
    documents = [Document(text, len(text.encode()), False) for text in texts]
    found = list(encode_documents(documents, tokenizer, 0))
    assert [document for document, _ in found] == documents
    for text, (_, ids) in zip(texts, found, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == [*tokenizer.encode(text, add_special_tokens=False).ids, 0]


def test_stopping_early_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are read few batches ahead; whoever stops reading them leaves no thread behind."""
    monkeypatch.setattr(encode_module, "BATCH_CHARACTERS", 50)
    threads = threading.active_count()
    read: list[int] = []

    def documents() -> Iterator[Document]:
        for i in range(1000):
            read.append(i)
            yield Document(WORDS, len(WORDS.encode()), False)

    encoded = encode_documents(documents(), SAFE[0], 0)
    assert isinstance(encoded, Generator)
    next(encoded)
    encoded.close()
    assert len(read) <= 3
    assert threading.active_count() == threads


def test_what_fails_in_the_thread_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while encoding is raised to the reader of the tokens."""
    monkeypatch.setattr(encode_module.WordEncoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(encode_documents([Document("the end", 7, False)], SAFE[0], 0))
