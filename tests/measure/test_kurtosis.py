"""Excess kurtosis by both definitions, each against a naive transcription."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from families import FAMILIES, REFUSED, build, tokens
from infer.checkpoints import byte_tokenizer
from trilobit.errors import DataError, ModelError
from trilobit.measure import kurtosis as kurtosis_module
from trilobit.measure.kurtosis import excess_kurtosis, measure_osp, osp_windows


def naive_kurtosis(row: list[float]) -> float:
    mean = math.fsum(row) / len(row)
    second, fourth = (math.fsum((v - mean) ** power for v in row) / len(row) for power in (2, 4))
    return fourth / second**2 - 3


def test_the_two_kurtoses_differ_as_stated() -> None:
    """Ours is centred: 0 for a constant, unmoved by an offset, and W − 5 + 1/(W − 1) where one channel holds
    everything (theirs: W − 3); theirs grows with the offset's fourth power."""
    spike = torch.zeros(1, 100)
    spike[0, 7] = 5
    assert excess_kurtosis(torch.full((2, 8), 3.0)).tolist() == [0, 0]
    assert excess_kurtosis(spike).item() == pytest.approx(95 + 1 / 99, rel=1e-12)
    assert kurtosis_module.osp_kurtosis(spike).item() == pytest.approx(97, rel=1e-5)
    row = torch.randn(40)
    assert excess_kurtosis(row).item() == pytest.approx(naive_kurtosis(row.tolist()), rel=1e-12)
    assert excess_kurtosis(spike + 4).item() == pytest.approx(excess_kurtosis(spike).item(), rel=1e-9)
    assert abs(excess_kurtosis(torch.randn(200, 4096)).mean().item()) < 0.02
    noise = torch.randn(50, 512)
    assert kurtosis_module.osp_kurtosis(noise + 10).mean() > 1000 > 1 > kurtosis_module.osp_kurtosis(noise).mean()


@pytest.mark.parametrize("elements", [1, 500, 1 << 25])
@pytest.mark.parametrize("family", FAMILIES)
def test_osp_is_the_authors_script(family: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is that of evaluate_kurtosis.py, transcribed, to 1e-6, whatever the number of tokens in a batch; each state's
    to the rounding of fp32 products."""
    monkeypatch.setattr(kurtosis_module, "STATE_ELEMENTS", elements)
    model, windows = build(family), tokens(3, 17)
    kurtosis = []
    with torch.no_grad():
        for seq in windows:
            hidden_states = model(seq.unsqueeze(1), output_hidden_states=True).hidden_states
            for hidden_state in hidden_states:
                x = hidden_state.float()
                kurtosis.append(((x**4).mean(-1) / x.std(-1) ** 4 - 3).relu().mean().item())
    result = measure_osp(model, windows, False)
    assert result.excess_kurtosis == pytest.approx(sum(kurtosis) / len(kurtosis), rel=1e-6)
    states = torch.tensor(kurtosis, dtype=torch.float64).view(len(windows), -1).mean(0)
    assert result.states == pytest.approx(states.tolist(), rel=1e-5)
    assert (result.tokens, result.windows, result.sequence_length) == (51, 3, 17)


def test_osp_text_is_joined_whole() -> None:
    """Documents are followed by a blank line, one beginning-of-text token stands before all, and reading stops early."""
    tokenizer, read = byte_tokenizer(adds_bos=True), []

    def texts():
        for index in range(2000):
            read.append(index)
            yield f"text {index}"

    windows = osp_windows(texts(), tokenizer, 16, True, 3)
    whole = tokenizer("\n\n".join(f"text {index}" for index in range(20)))["input_ids"]
    assert whole[0] == tokenizer.bos_token_id
    assert windows.flatten().tolist() == whole[:48]
    assert len(read) < 40
    assert osp_windows(["text 0", "text 1"], tokenizer, 4, False, 3).flatten().tolist() == whole[1:13]
    assert len(osp_windows(["text 0"], tokenizer, 3, False, 100)) == 2
    with pytest.raises(DataError, match="has 8 tokens, fewer than one sequence of 9"):
        osp_windows(["text 0"], tokenizer, 9, False, 1)


def test_what_osp_cannot_measure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is not finite is named; without decoder layers or hidden states there is nothing to measure; roles are not
    needed."""
    windows = tokens(2, 20)
    model = build("llama")
    for layer, says in ((1, "layer 1's"), (2, "final norm's")):
        handle = model.model.layers[layer].register_forward_hook(lambda module, inputs, output: output * math.inf)
        with pytest.raises(ModelError, match=f"the {says} output is not finite"):
            measure_osp(model, windows, False)
        handle.remove()
    with torch.no_grad():
        model.model.embed_tokens.weight[windows[1, 3]] = math.nan
    with pytest.raises(ModelError, match="the embedding's output is not finite"):
        measure_osp(model, windows, False)
    monkeypatch.setattr(model.model, "forward", lambda **options: SimpleNamespace(last_hidden_state=torch.zeros(1, 1, 8)))
    with pytest.raises(ModelError, match="gives no hidden states"):
        measure_osp(model, windows, False)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="has no transformers decoder layers"):
        measure_osp(model, windows, False)
    assert measure_osp(REFUSED["gpt2"][0](), windows, False).excess_kurtosis > 0
