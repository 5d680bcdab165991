"""Relations between tokens: against a naive loop, and caught without changing the model."""

import math

import pytest
import torch

from families import FAMILIES, build
from trilobit.errors import ConfigError
from trilobit.train.relations import Recorder, relation_divergence


def naive(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Mean over batch, heads and positions of KL(softmax(t tᵀ/√d) ‖ softmax(s sᵀ/√d)), number by number."""
    total, count = 0.0, 0
    for s, t in zip(student.flatten(0, 1).double().tolist(), teacher.flatten(0, 1).double().tolist(), strict=True):
        for i in range(len(s)):
            logits = [[sum(a * b for a, b in zip(x[i], other, strict=True)) / len(x[i]) ** 0.5 for other in x] for x in (s, t)]
            norms = [math.log(math.fsum(map(math.exp, row))) for row in logits]
            total += sum(math.exp(q - norms[1]) * ((q - norms[1]) - (p - norms[0])) for p, q in zip(*logits, strict=True))
            count += 1
    return total / count


def test_relations_equal_a_naive_loop() -> None:
    """The loss is the sum over three pairs of states, whose heads may differ in number, and zero between equals."""
    student, teacher = ([torch.randn(2, heads, 5, 4) for heads in (3, 1, 1)] for _ in range(2))
    expected = sum(naive(s, t) for s, t in zip(student, teacher, strict=True))
    assert relation_divergence(tuple(student), tuple(teacher)).item() == pytest.approx(expected, rel=1e-5)
    assert relation_divergence(tuple(student), tuple(student)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_layer(family: str) -> None:
    """In every family the recorder sees one layer's queries, keys and values, with their gradients, and changes no logit."""
    model = build(family).eval()
    ids = torch.randint(3, 50, (2, 7))
    before = model(input_ids=ids, use_cache=False).logits
    recorder = Recorder(model, 1)
    after = model(input_ids=ids, use_cache=False).logits
    states = recorder.take()
    assert torch.equal(before, after)
    config = model.config.get_text_config()
    assert [s.shape[:3:2] for s in states] == [(2, 7)] * 3
    assert [s.shape[1] for s in states] == [config.num_attention_heads] + [config.num_key_value_heads] * 2
    sum(s.square().sum() for s in states).backward()
    learned = [name.split(".layers.")[1][0] for name, p in model.named_parameters() if p.grad is not None and "layers" in name]
    assert set(learned) == {"0", "1"}
    recorder.close()
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=ids, use_cache=False)
    with pytest.raises(AssertionError):
        recorder.take()


def test_layers_that_are_not_there_are_refused() -> None:
    """A layer beyond the last is a ConfigError, and the model's attention is what it was."""
    model = build("llama")
    with pytest.raises(ConfigError, match="--distill-attention-layer 9: the model has 3 layers"):
        Recorder(model, 9)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="runs as sdpa, and this one is eager"):
        Recorder(model, 0)
