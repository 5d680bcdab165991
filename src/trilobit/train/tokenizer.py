"""A tokenizer made of the training text: byte-level BPE, which has a code for every text there is."""

from collections.abc import Callable, Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trilobit.corpus import Document
from trilobit.errors import DataError

END_OF_TEXT = "<|endoftext|>"
TEXT_BYTES = 200_000_000  # the merges that more text would give are nearly the same


def train_tokenizer(
    documents: Iterable[Document], vocab_size: int, between: Callable[[], None] = lambda: None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries, one of which ends and begins texts, from the documents that are trained on
    (the held-out ones are left out), the first 200 MB of them. `between` is called after each.

    Equal text gives an equal tokenizer. Raises DataError where the text has too few distinct words for so many entries.
    """

    def texts() -> Iterable[str]:
        size = 0
        for document in documents:
            between()
            if not document.held_out:
                yield document.text
                size += document.bytes
            if size >= TEXT_BYTES:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise DataError(f"the text gives a tokenizer of {found:,} entries, not {vocab_size:,}: lower --train-tokenizer.")
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of ours, as transformers has them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
