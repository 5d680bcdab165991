"""Tokenizers out of GGUF metadata: the ids of the tokenizers that they were made from."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from infer.ggufs import write_gguf
from trilobit.errors import ModelError
from trilobit.infer.gguf_tokenizer import read_tokenizer
from trilobit.infer.load import load

TEXTS = [
    "Once upon a time, there was a little girl.", " two  spaces   and\n\nlines\r\n\t", "it's WE'LL I'm don'T", "12345 6 7.8e9",
    "naïve café ÀÉ 日本語 🙂 e\u0301", "x=1;  if(y){z+=2}", "", " ", "\n", "<s> and </s> in a text", "▁under", "a\u00a0b",
]  # fmt: skip
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}  # fmt: skip


def trained(cut: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts text as the families do whose name `cut` is."""
    backend = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(CUTS[cut])
    backend.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 30, trainer)
    if cut == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>")


def metadata(tokenizer: PreTrainedTokenizerFast, pre: str) -> dict[str, Any]:
    """The keys that a converter writes."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    special = set(tokenizer.all_special_tokens)
    prefix = "tokenizer.ggml."
    found: dict[str, Any] = {f"{prefix}tokens": tokens, f"{prefix}token_type": [3 if t in special else 1 for t in tokens]}
    for role, name in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("unknown", tokenizer.unk_token_id)):
        if name is not None:
            found[f"{prefix}{role}_token_id"] = name
    if not description["model"].get("byte_fallback"):
        return found | {f"{prefix}model": "gpt2", f"{prefix}pre": pre, f"{prefix}merges": merges}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ", 1)), rank)
    scores = [-float(ranks.get(token, 1e6)) for token in tokens]
    types = [6 if t.startswith("<0x") else 2 if t == "<unk>" else 3 if t in special else 1 for t in tokens]
    return found | {f"{prefix}model": "llama", f"{prefix}scores": scores, f"{prefix}token_type": types}


def same(one: Any, other: Any, seed: int = 0) -> None:
    chosen = random.Random(seed)
    alphabet = "".join(TEXTS)
    mixed = ["".join(chosen.choices(alphabet, k=chosen.randint(1, 40))) for _ in range(300)]
    for text in [*TEXTS, *mixed]:
        assert one(text)["input_ids"] == other(text)["input_ids"], text
        ids = one(text)["input_ids"]
        assert one.decode(ids, skip_special_tokens=True) == other.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_tokenizers_come_back(tmp_path: Path, cut: str) -> None:
    """By the name of how text is cut: ids and texts are the original's, special tokens and start token included."""
    original = trained(cut)
    read = read_tokenizer(metadata(original, cut), tmp_path, 600)
    same(read, original)
    assert (read.bos_token, read.eos_token) == ("<|start|>", "<|end|>")
    assert read("a<|end|>b")["input_ids"] == original("a<|end|>b")["input_ids"]


def test_a_byte_fallback_tokenizer_comes_back(stories260k: Path, tmp_path: Path) -> None:
    """Scores instead of merges: the ids of the real tokenizer of stories260K."""
    original = AutoTokenizer.from_pretrained(stories260k)
    read = read_tokenizer(metadata(original, ""), tmp_path, len(original))
    same(read, original)
    without = metadata(original, "") | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    assert read_tokenizer(without, tmp_path, len(original))("Once").tokens()[0] != "<s>"


def test_an_unknown_way_of_cutting_needs_the_tokenizer_beside_it(tmp_path: Path) -> None:
    """A name that is not known is refused; a tokenizer.json beside the file serves if its tokens are the file's."""
    original = trained("gpt-2")
    said = metadata(original, "some-new-one")
    with pytest.raises(ModelError, match=r"not known here \(gpt2, some-new-one\): put the tokenizer.json of the model"):
        read_tokenizer(said, tmp_path, 600)
    original.save_pretrained(tmp_path)
    same(read_tokenizer(said, tmp_path, 600), original)
    said["tokenizer.ggml.tokens"][7] = "other"
    with pytest.raises(ModelError, match="has other tokens: 1 differ"):
        read_tokenizer(said, tmp_path, 600)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": []}, "0 tokens"),
        ({"tokens": 3}, "no list of str"),
        ({"tokens": ["a", "a"]}, "some twice"),
        ({"token_type": [1]}, "types of tokens"),
        ({"merges": ["a"]}, "its tokenizer could not be loaded"),
        ({"merges": ["no such"]}, "its tokenizer could not be loaded"),
        ({"bos_token_id": 10_000}, "its bos token is 10000"),
        ({"model": "llama"}, "0 scores"),
        ({"model": "rwkv"}, "not known here"),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """Lists that do not fit each other or the embedding are refused."""
    said = metadata(trained("gpt-2"), "gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelError, match=says):
        read_tokenizer(said, tmp_path, 600)


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    """An embedding with fewer rows than tokens."""
    original = trained("gpt-2")
    rows = len(original) - 1
    with pytest.raises(ModelError, match=f"beyond the embedding's {rows} rows"):
        read_tokenizer(metadata(original, "gpt-2"), tmp_path, rows)


def test_giant_tokens_cost_no_time(tmp_path: Path) -> None:
    """Every split of every token is looked at: tokens that would make that expensive are refused."""
    tokens = ["<unk>", *("a" * n for n in range(1, 3000))]
    said = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2] + [1] * (len(tokens) - 1),
    }  # fmt: skip
    with pytest.raises(ModelError, match="too long to be any language's"):
        read_tokenizer(said, tmp_path, len(tokens))


def test_a_chat_template_comes_along(tmp_path: Path) -> None:
    """It is the tokenizer's."""
    written = write_gguf(
        tmp_path / "model.gguf", "llama", "q2_0",
        change=lambda writer: writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}"),
    )  # fmt: skip
    tokenizer = load(written.path).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
