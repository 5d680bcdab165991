"""`trilobit doctor`: what it finds and what it advises."""

import os

import pytest

from trilobit.config.doctor import DoctorConfig
from trilobit.doctor import advice, run, thread_advice, usable_cores
from trilobit.kernels import build, native


@pytest.mark.skipif(not native.available(), reason="no C++ compiler has built the kernels")
def test_it_says_what_computes_here() -> None:
    """Kernels, their reason, the layout that goes with them and a memory rate are in the result and in the text."""
    result = run(DoctorConfig(threads=1))
    assert result.kernels in result.instruction_sets and result.kernels == native.choice().name
    assert result.layout == ("base-3" if "avx512vbmi" in result.instruction_sets else "two-bit")
    assert result.bandwidth and result.bandwidth > 1e8
    assert result.precision.startswith(("fp32: ", "bf16: ")), "of training, and why"
    for said in (result.kernels, result.reason, str(result.layout), "GB/s", f"training     {result.precision}"):
        assert said in result.summary()


def test_advice_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels the advice is how to get them; on an x86 processor without VBMI, what it would bring."""
    assert "kernels" in advice([], None)[0]
    monkeypatch.setattr(build, "machine", lambda: "x86_64")
    assert any("VBMI" in line for line in advice(["scalar", "avx2"], 1e9))
    assert not any("VBMI" in line for line in advice(["scalar", "avx512", "avx512vbmi"], 1e9))
    assert any("none of the instruction sets" in line for line in advice(["scalar"], 1e9))


def test_idle_cores_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer threads than cores are said with what holds them back (old code: "nothing faster" beside one thread of two)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert thread_advice(1, 2) == ["all cores: 1 thread of 2 is used (OMP_NUM_THREADS is 1: unset it)"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert thread_advice(2, 8) == ["all cores: 2 threads of 8 are used (set OMP_NUM_THREADS=8)"]
    assert thread_advice(2, 2) == []
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
