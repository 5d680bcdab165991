"""What `--precision auto` stands for on a device. (test_tune.py: that a run keeps it.)"""

import pytest
import torch

from trilobit.train import precision as precision_module
from trilobit.train.precision import decide_precision, multiplication_rates

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("rates", "expected"), [((2e11, 1e11), "fp32"), ((2e11, 2.2e11), "fp32"), ((2e11, 4e11), "bf16")])
def test_a_cpu_takes_what_it_multiplies_faster(
    rates: tuple[float, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 has to be worth its rounding; both rates are said."""
    monkeypatch.setattr(precision_module, "multiplication_rates", lambda: rates)
    found, why = decide_precision(CPU)
    assert found == expected
    assert f"{rates[0] / 1e9:.0f} GFLOP/s in fp32, {rates[1] / 1e9:.0f} in bf16" in why


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_takes_bf16_if_it_has_it(has: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bf16 (Turing) does not count."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert decide_precision(GPU)[0] == expected


def test_rates_are_those_of_this_cpu() -> None:
    """More than a megaflop and less than a petaflop a second, of both."""
    assert all(1e6 < rate < 1e15 for rate in multiplication_rates())
