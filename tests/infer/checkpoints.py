"""Small checkpoints with tokenizers, shared by the tests of loading, generating, measuring, exporting and the command line."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import build

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}
BYTES = 3 + 256


def byte_tokenizer(*, adds_bos: bool = False, has_bos: bool = True, merges: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, plus merges such as "a b"; <s> is put in front of a text if `adds_bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = SPECIAL | {symbol: 3 + index for index, symbol in enumerate(alphabet)}
    pairs = [(left, right) for left, right in (merge.split() for merge in merges)]
    vocabulary |= {left + right: BYTES + index for index, (left, right) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    specials = {"bos_token": "<s>"} if has_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", **specials)


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """`words` tokens: the three special ones and w3, w4, …"""
    vocabulary = SPECIAL | {f"w{index}": index for index in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )


def byte_model(family: str = "llama", **settings: Any) -> PreTrainedModel:
    return build(family, **{"vocab_size": BYTES, "num_hidden_layers": 2, **settings})


def save(folder: Path, model: PreTrainedModel | None = None, tokenizer: Any = None) -> Path:
    """Write an ordinary checkpoint as transformers does."""
    (byte_model() if model is None else model).save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder
