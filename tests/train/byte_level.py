"""Small byte-level BPE tokenizers, shared by the tests of tokenising."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = "It isn't the  end:\n\n\tthey'll (perhaps) return 1984 times, naïvely…   and\n again\r\n"
VOCABULARY = 300


def make_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str = WORDS * 3) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(**options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def with_added(tokenizer: Tokenizer, token: AddedToken) -> Tokenizer:
    tokenizer.add_tokens([token])
    return tokenizer


def with_normalizer(tokenizer: Tokenizer, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer.normalizer = normalizer
    return tokenizer


SAFE = [
    make_tokenizer(byte_level()),
    make_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
    with_added(with_normalizer(make_tokenizer(byte_level()), normalizers.NFC()), AddedToken("they", lstrip=True)),
    with_added(make_tokenizer(byte_level()), AddedToken("the", single_word=True)),
]
