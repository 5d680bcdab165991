"""Continuing prompts, and sampling documents from a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from infer.checkpoints import byte_model, byte_tokenizer, save
from trilobit.config.generate import GenerateConfig
from trilobit.errors import ConfigError, ModelError
from trilobit.infer.generate import continue_tokens, run, sample_documents
from trilobit.listener import Listener

PROMPT = torch.tensor([[1, 20, 30, 40]])


class Heard(Listener):
    def __init__(self) -> None:
        self.pieces: list[str] = []

    def stream(self, text: str) -> None:
        self.pieces.append(text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"))


def naive_greedy(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
        if best.item() == 2:
            break
    return ids


def test_greedy_is_the_argmax_and_transformers_own() -> None:
    """Temperature 0 equals an argmax loop without a cache and HF generate, whatever the seed."""
    model = byte_model()
    ours = continue_tokens(model, PROMPT, 20)
    assert torch.equal(ours, naive_greedy(model, PROMPT, 20))
    assert torch.equal(ours, model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=20, do_sample=False))
    assert torch.equal(ours, continue_tokens(model, PROMPT, 20, seed=5))


def test_sampling_depends_on_the_seed_alone() -> None:
    """Equal seeds give equal samples whatever random numbers were drawn before, other seeds others, and the global
    generator is left where it was."""
    model = byte_model()
    first = continue_tokens(model, PROMPT, 20, temperature=1.0, seed=3)
    torch.randn(7)
    state = torch.get_rng_state()
    assert torch.equal(first, continue_tokens(model, PROMPT, 20, temperature=1.0, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, continue_tokens(model, PROMPT, 20, temperature=1.0, seed=4))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_checkpoints_generation_settings_do_not_bend_the_distribution(temperature: float) -> None:
    """Penalties and cut-offs of generation_config.json are ignored, its end-of-text kept, and it is put back (the old
    code sampled with them, so that text "from the model itself" was not)."""
    model = byte_model()
    expected = continue_tokens(model, PROMPT, 20, temperature=temperature)
    bent = GenerationConfig(
        eos_token_id=2,
        repetition_penalty=9.0,
        top_k=1,
        min_p=0.9,
        no_repeat_ngram_size=1,
        bad_words_ids=[[i] for i in range(9, 200)],
    )
    model.generation_config = bent
    assert torch.equal(continue_tokens(model, PROMPT, 20, temperature=temperature), expected)
    assert model.generation_config is bent
    assert (bent.repetition_penalty, bent.top_k) == (9.0, 1)


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    """With a tiny top_p sampling is greedy."""
    model = byte_model()
    assert torch.equal(continue_tokens(model, PROMPT, 10, temperature=1.0, top_p=1e-6), continue_tokens(model, PROMPT, 10))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streamed_pieces_join_to_the_text(checkpoint: Path, temperature: float) -> None:
    """What the listener hears is the text and a newline, and the result counts its tokens."""
    heard = Heard()
    settings = GenerateConfig(
        model=str(checkpoint), prompt="naïve ✓ text", max_tokens=40, temperature=temperature, device="cpu"
    )
    result = run(settings, heard)
    assert len(heard.pieces) > 1
    assert "".join(heard.pieces) == result.text + "\n"
    assert 0 < result.tokens <= 40
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert run(settings).text == result.text
    assert "naïve" not in result.text


def test_an_empty_prompt_starts_at_beginning_of_text(checkpoint: Path, tmp_path: Path) -> None:
    """An empty prompt is the beginning-of-text token alone; without such a token it is refused."""
    result = run(GenerateConfig(model=str(checkpoint), prompt="", max_tokens=8, device="cpu"))
    tokens = continue_tokens(byte_model(), torch.tensor([[1]]), 8)[0, 1:]
    assert result.text == byte_tokenizer().decode(tokens, skip_special_tokens=True)
    save(tmp_path, tokenizer=byte_tokenizer(has_bos=False))
    with pytest.raises(ConfigError, match="prompt is empty"):
        run(GenerateConfig(model=str(tmp_path), prompt="", max_tokens=8, device="cpu"))


def test_documents_sampled_from_a_model() -> None:
    """Documents have at most `length` tokens, end at their first end-of-text and nowhere later, start after the start
    token, reach `tokens` in total with the last and not before, and depend on the seed."""
    model = byte_model(vocab_size=12)
    model.generation_config.eos_token_id = 2
    found = list(sample_documents(model, 1, 2, tokens=500, length=16, seed=0, rows=8))
    assert all(0 < len(document) <= 16 for document in found)
    assert any(document[-1] == 2 for document in found)
    assert any(len(document) == 16 and document[-1] != 2 for document in found)
    assert all(2 not in document[:-1] for document in found)
    assert sum(map(len, found)) >= 500
    assert sum(map(len, found[:-8])) < 500
    again = list(sample_documents(model, 1, 2, tokens=500, length=16, seed=0, rows=8))
    assert all(map(np.array_equal, found, again))
    other = list(sample_documents(model, 1, 2, tokens=500, length=16, seed=99, rows=8))
    assert not all(map(np.array_equal, found, other))


def test_documents_hold_no_padding_after_another_end_of_text() -> None:
    """Where the checkpoint stops at other tokens than the tokenizer's, a document ends there (old code: kept the pads)."""
    model = byte_model(vocab_size=12)
    model.generation_config.eos_token_id = [5, 6]
    for document in sample_documents(model, 1, 2, tokens=300, length=16, seed=0, rows=8):
        assert not set(document[:-1].tolist()) & {2, 5, 6}


def test_documents_without_end_of_text_have_full_length() -> None:
    """A model that never ends a text gives documents of `length` tokens."""
    model = byte_model(vocab_size=12)
    model.generation_config.eos_token_id = None
    assert {len(d) for d in sample_documents(model, 1, None, tokens=100, length=7, seed=0, rows=4)} == {7}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_give_no_text(temperature: float, value: float) -> None:
    """A damaged model is refused, cut-offs or none (old code: a traceback when sampling, the first token when not)."""
    model = byte_model()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(ModelError, match="not finite"):
        continue_tokens(model, PROMPT, 5, temperature=temperature, top_p=0.5)


def test_text_beyond_the_models_positions_is_refused(checkpoint: Path) -> None:
    """Prompt and new tokens together fit the 64 positions, or the error says how many would (old code: transformers' text
    from positions that were never trained)."""
    settings = {"model": str(checkpoint), "prompt": "a" * 60, "device": "cpu"}
    assert run(GenerateConfig(**settings, max_tokens=4)).tokens <= 4
    with pytest.raises(ConfigError, match=r"--max-tokens 5 after a prompt of 60 tokens .* at most 4 fit"):
        run(GenerateConfig(**settings, max_tokens=5))
    with pytest.raises(ConfigError, match="the prompt has 64 tokens, and the model 64 positions"):
        run(GenerateConfig(**settings | {"prompt": "a" * 64}, max_tokens=1))
