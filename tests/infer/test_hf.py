"""Continuing tokens through transformers, and sampling text from a model."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from infer.checkpoints import byte_model
from trilobit.errors import ModelError
from trilobit.infer.hf import continue_tokens, sample_windows

PROMPT = torch.tensor([[1, 20, 30, 40]])


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


def chains(model: Any, number: int, **settings: Any) -> list[np.ndarray]:
    return list(
        itertools.islice(sample_windows(model, 1, **{"tokens": 500, "length": 16, "seed": 0, "rows": 8, **settings}), number)
    )


def test_windows_sampled_from_a_model() -> None:
    """Chains are whole windows long, as many as make up the tokens asked for and one more, begin with the start token, run on
    after an end-of-text token, go on without end, and depend on the seed alone."""
    model = byte_model(vocab_size=12)
    model.generation_config.eos_token_id = [2, 5]
    found = chains(model, 20)
    assert {len(chain) for chain in found} == {16 * 16}  # 16 windows at least
    assert {len(chain) for chain in chains(model, 3, tokens=8 * 20 * 16)} == {21 * 16}
    assert {len(chain) for chain in chains(model, 3, tokens=900, rows=None)} == {20 * 16}, "three rows rather than short chains"
    assert all(chain[0] == 1 for chain in found)
    assert any(set(chain[:-1].tolist()) & {2, 5} for chain in found)
    assert len({chain.tobytes() for chain in found}) == 20
    torch.manual_seed(5)
    assert all(map(np.array_equal, found, chains(model, 20)))
    assert not any(map(np.array_equal, found, chains(model, 20, seed=99)))
    assert model.generation_config.eos_token_id == [2, 5]


def test_a_models_loss_on_its_own_windows_is_its_entropy() -> None:
    """Read as windows of that length, text is drawn from just what the model predicts there, but for the start token of the
    next chain; read as windows of another length it is not (nor were documents cut into windows)."""
    model = byte_model(vocab_size=12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform, and sensitive to what came before
    text = torch.from_numpy(np.concatenate(chains(model, 64, tokens=64 * 15 * 16, rows=64)))
    excess = {}
    for length in (16, 5):
        windows = text[: (len(text) - 1) // length * length + 1].unfold(0, length + 1, length)
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=windows[:, :-1]).logits.double(), dim=-1)
        drawn = -scores.gather(2, windows[:, 1:, None])[..., 0]
        sampled = torch.ones_like(drawn, dtype=torch.bool)
        if length == 16:
            sampled[15::16, 15] = False  # the next chain's start token
        difference = (drawn + (scores.exp() * scores).sum(dim=-1))[sampled]
        excess[length] = (difference.mean() / difference.std() * len(difference) ** 0.5).item()
    assert abs(excess[16]) < 4, "standard errors"
    assert excess[5] > 8


def test_work_between_windows_can_stop_the_sampling() -> None:
    """What is called between windows ends it by raising, before a chain is whole."""

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        chains(byte_model(vocab_size=12), 1, between=stop)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_give_no_text(temperature: float, value: float) -> None:
    """A damaged model is refused, cut-offs or none (old code: a traceback when sampling, the first token when not)."""
    model = byte_model()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(ModelError, match="not finite"):
        continue_tokens(model, PROMPT, 5, temperature=temperature, top_p=0.5)
