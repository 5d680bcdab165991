from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
from trilobit.infer import cuda_graph, hf
from trilobit.infer.cuda_graph import GraphedSteps, cache_obstacle, obstacle
from trilobit.infer.hf import continue_tokens
from trilobit.infer.stored import freeze
from trilobit.surgery.ternary import TernarySpec, ternarize

PLAIN = [family for family in families.FAMILIES if family != "gemma3_text"]


def ternary(family: str) -> PreTrainedModel:
    model = families.build(family)
    ternarize(model, TernarySpec(placement="every"))
    return freeze(model)  # pyright: ignore[reportReturnType]


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has every model take its tokens from steps as a graph would replay them, without a graph; how many there were."""
    taken: list[int] = []

    class Steps(GraphedSteps):
        def _step(self) -> None:
            taken.append(1)
            super()._step()

    monkeypatch.setattr(hf, "obstacle", cache_obstacle)
    monkeypatch.setattr(hf, "GraphedSteps", partial(Steps, capture=False))
    return taken


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", PLAIN)
def test_steps_are_the_models_tokens(family: str, options: dict[str, Any], stepped: list[int]) -> None:
    """Two rows of a ternary model, with prompts of five tokens and of one, continued by steps from a fixed place: the tokens of
    transformers' own way, all but the first by a step; the model is left as it was."""
    model = ternary(family)
    for prompt in (families.tokens(2, 5), families.tokens(2, 1)):
        found = continue_tokens(model, prompt, 20, ends=False, **options)
        assert len(stepped) == 19
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf, "obstacle", obstacle)  # no CUDA device: as ever
            assert torch.equal(found, continue_tokens(model, prompt, 20, ends=False, **options))
        assert len(stepped) == 19 and "forward" not in vars(model)
        stepped.clear()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_reads_as_much_as_there_is(family: str, stepped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are read in powers of two of the first number, as far as there are any, and another graph is made for each; the
    tokens stay transformers' own."""
    monkeypatch.setattr(cuda_graph, "LEAST_READ", 4)
    model, read = ternary(family), []
    more = GraphedSteps._read_more

    def noted(self: GraphedSteps) -> None:
        self._graph = "old"  # pyright: ignore[reportAttributeAccessIssue]
        more(self)
        assert self._graph is None
        read.append((self.seen, self.read))

    monkeypatch.setattr(GraphedSteps, "_read_more", noted)
    cases = {5: [(5, 8), (9, 16), (17, 25)], 4: [(4, 4), (5, 8), (9, 16), (17, 24)]}
    for length, expected in cases.items():
        prompt = families.tokens(2, length)
        found = continue_tokens(model, prompt, 20, ends=False)
        assert read == expected and stepped
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf, "obstacle", obstacle)
            assert torch.equal(found, continue_tokens(model, prompt, 20, ends=False))
        read.clear()


def test_short_texts_are_not_worth_a_graph(stepped: list[int]) -> None:
    continue_tokens(ternary("llama"), families.tokens(1, 3), cuda_graph.WORTHWHILE - 1, ends=False)
    assert not stepped


def test_windows_of_attention_have_no_graph() -> None:
    """What forgets tokens counts them on the host; and on a CPU there is none at all."""
    for model in (families.build("gemma3_text"), families.build("mistral", sliding_window=30)):
        assert cache_obstacle(model, 31) == "not every layer keeps all of its tokens"
    assert cache_obstacle(families.build("mistral", sliding_window=30), 30) is None
    assert cache_obstacle(families.build("llama"), 31) is None
    assert obstacle(families.build("llama"), 31) == "it is not on a CUDA device"


def test_a_model_that_waits_is_run_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the capture fails, which is said once, the text is what it would have been."""

    class Refusing:
        def __init__(self, *_: Any) -> None:
            self.wait_stream = lambda stream: None
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: object())
    monkeypatch.setattr(torch.cuda, "Stream", Refusing)
    model, prompt = ternary("llama"), families.tokens(2, 5)
    expected = continue_tokens(model, prompt, 20, ends=False)
    monkeypatch.setattr(hf, "obstacle", cache_obstacle)
    with pytest.warns(UserWarning, match="not taken by one CUDA graph") as said:
        assert torch.equal(continue_tokens(model, prompt, 20, ends=False), expected)
    assert len(said) == 1
