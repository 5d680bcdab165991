"""Tokenizers in GGUF: what llama.cpp would leave out is refused, and end tokens and chat templates are all there."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from families import build
from infer.checkpoints import BYTES, byte_tokenizer
from trilobit.errors import ExportError
from trilobit.export import gguf
from trilobit.export.gguf_vocabulary import add_vocabulary
from trilobit.export.source import Source
from trilobit.infer.gguf_file import open_gguf
from trilobit.infer.gguf_tokenizer import LLAMA_3, QWEN_2

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MERGES = ("b c", "a b", "a bc")  # the word "abc" becomes a, bc, and then abc: merges make each of their tokens
BARREN = ("a b", "b c", "a bc")  # ab, c: nothing makes abc of a text


def sequence(first: dict[str, Any], **byte_level: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, BYTE_LEVEL | byte_level]}


def split(pattern: str, **change: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | change


DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA, QWEN = (sequence(split(pattern), use_regex=False) for pattern in (LLAMA_3, QWEN_2))
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
SPACES: dict[str, Any] = {"byte_fallback": True, "unk_token": "<pad>", "pre_tokenizer": None}
NFC, NFKC = {"type": "NFC"}, {"type": "NFKC"}


def changed(
    pre_tokenizer: Any = BYTE_LEVEL,
    normalizer: Any = None,
    merges: tuple[str, ...] = MERGES,
    eos: str | None = "</s>",
    **model: Any,
) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of the tests with parts exchanged, as from a tokenizer.json."""
    description = json.loads(byte_tokenizer(merges=merges).backend_tokenizer.to_str())
    description |= {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    description["model"] |= model
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token=eos)


def metadata(folder: Path, tokenizer: Any, ends: list[int] | None = None) -> dict[str, Any]:
    """What a file says of a tokenizer."""
    source = Source(build("llama", vocab_size=BYTES + 3, eos_token_id=ends), None, tokenizer)
    gguf.write(source, folder / "m.gguf")
    own = open_gguf(folder / "m.gguf").metadata
    return {key.removeprefix("tokenizer."): value for key, value in own.items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"normalizer": NFKC}, "does not normalise text, and this tokenizer does .NFKC.*--to native or --to hf"),
        ({"normalizer": NFC}, "NFC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [NFC, {"type": "Lowercase"}]}, "pre_tokenizer": QWEN}, "does .Low"),
        ({"normalizer": NFKC, "pre_tokenizer": sequence(DIGITS)}, "NFKC"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": sequence(DIGITS, add_prefix_space=True)}, "add_prefix_space"),
        ({"pre_tokenizer": sequence(split(QWEN_2), use_regex=False, add_prefix_space=True)}, "add_prefix_space"),
        ({"pre_tokenizer": sequence(split(QWEN_2, invert=True), use_regex=False)}, "no name for the way .*Split, ByteLevel"),
        ({"pre_tokenizer": None}, "not at all"),
        ({"merges": BARREN, "ignore_merges": True}, "always merges .*'abc'"),
        ({"merges": BARREN, "pre_tokenizer": LLAMA}, "takes words that are tokens as they are .*ignore_merges false.*'abc'"),
        ({"merges": (), "end_of_word_suffix": "</w>"}, "no end_of_word_suffix, and .*</w>"),
        ({"merges": (), "continuing_subword_prefix": "##"}, "no continuing_subword_prefix"),
        ({"dropout": 0.1}, "no dropout"),
        ({"byte_fallback": True, "unk_token": "<pad>"}, "do not split text, and this one does .ByteLevel"),
        (SPACES | {"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}, "unless one is there"),
        (SPACES | {"pre_tokenizer": METASPACE | {"split": True}}, "do not split text, and this one does .Metaspace"),
        (SPACES, "write spaces as ▁, and this one does not"),
        ({"byte_fallback": True, "unk_token": "<pad>", "normalizer": NFKC, "pre_tokenizer": None}, "but for its spaces.*NFKC"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_leave_out_is_refused(tokenizer: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A tokenizer that does more than llama.cpp's does is not written as that one (it was, whatever else it did)."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    with pytest.raises(ExportError, match=words):
        add_vocabulary(writer, changed(**tokenizer), BYTES + 3, [])


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        ({}, "gpt-2"),
        ({"ignore_merges": True}, "gpt-2"),
        ({"pre_tokenizer": sequence(DIGITS)}, "smollm"),
        ({"pre_tokenizer": QWEN, "normalizer": NFC}, "qwen2"),
        ({"pre_tokenizer": LLAMA}, "llama-bpe"),
        ({"pre_tokenizer": LLAMA, "ignore_merges": True, "merges": BARREN}, "llama-bpe"),
    ],
)
def test_names_of_splittings(tokenizer: dict[str, Any], name: str, tmp_path: Path) -> None:
    """What is one of llama.cpp's is written as that; ignore_merges is no obstacle where it changes nothing."""
    assert metadata(tmp_path, changed(**tokenizer))["ggml.pre"] == name


def test_byte_fallback_that_only_writes_spaces(tmp_path: Path) -> None:
    """As Llama 2's, Gemma's, and Metaspace's; only the first puts a space in front of a text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"normalizer": prepend}, True),
        ({"normalizer": replace, "pre_tokenizer": cut}, False),
        ({"pre_tokenizer": METASPACE}, False),
    ]
    for change, prefix in cases:
        found = metadata(tmp_path, changed(**(SPACES | change)))
        assert (found["ggml.model"], found["ggml.add_space_prefix"]) == ("llama", prefix)


def test_end_tokens_of_the_checkpoint(tmp_path: Path) -> None:
    """The tokenizer's end token first, then the checkpoint's (llama.cpp took number 11 for one where only that had any)."""
    for ends, own, wanted in (([2, 1], None, [2, 1]), ([1, 2, 5], "</s>", [2, 1, 5]), ([2], None, [2]), (None, "</s>", [2])):
        found = metadata(tmp_path, changed(eos=own), ends)
        names = [found.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        assert [token for token in names if token is not None] == wanted
    with pytest.raises(ExportError, match=r"has an end token, and llama.cpp would stop at some ordinary one\. Set eos_token"):
        metadata(tmp_path, changed(eos=None), None)


def test_several_chat_templates(tmp_path: Path) -> None:
    """The default one is the file's, others are there by name (with more than one, all were lost)."""
    tokenizer = changed()
    tokenizer.chat_template = {"default": "{{ a }}", "tool-use": "{{ b }}", "rag": "{{ c }}"}  # pyright: ignore
    found = metadata(tmp_path, tokenizer)
    assert {key: value for key, value in found.items() if "template" in key} == {
        "chat_template": "{{ a }}", "chat_template.tool_use": "{{ b }}", "chat_template.rag": "{{ c }}",
        "chat_templates": ["rag", "tool_use"],
    }  # fmt: skip
    tokenizer.chat_template = "{{ d }}"
    assert metadata(tmp_path, tokenizer)["chat_template"] == "{{ d }}"
