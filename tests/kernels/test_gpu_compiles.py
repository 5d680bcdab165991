"""The Triton kernels compile to machine code for an H100 and an A100, on a machine without either (compile_gpu.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def compiled(folder: Path, *arguments: str) -> dict[str, list[str]]:
    """What compile_gpu.py says of each kernel: its lines, by name."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, str(Path(__file__).with_name("compile_gpu.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        lines.setdefault(line.split()[1], []).append(line)
    return lines


def check(lines: dict[str, list[str]]) -> None:
    """Six kernels; those whose bits are the definition's have no fused product and sum in them; few tokens meet dp4a."""
    assert set(lines) == {
        "norm_quantize_kernel", "norm_backward_kernel", "ternarize_kernel", "linear_kernel", "few_kernel", "symmetric_kernel",
    }  # fmt: skip
    for name in ("norm_quantize_kernel", "ternarize_kernel", "linear_kernel", "few_kernel"):
        assert not any("fma.rn.f32" in line for line in lines[name])
    assert all("dp4a" in line for line in lines["few_kernel"])


def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """At a 2 B model's shapes, with the products on Hopper's tensor cores and nothing spilled to the stack."""
    lines = compiled(tmp_path, "--few", "sm_90")
    check(lines)
    assert all("wgmma" in line for name in ("linear_kernel", "symmetric_kernel") for line in lines[name])
    if "STACK" in lines["linear_kernel"][0]:
        assert all("STACK:0" in line for rows in lines.values() for line in rows)


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["sm_80", "sm_90"])
def test_kernels_compile_for_every_shape(processor: str, tmp_path: Path) -> None:
    """Odd shapes, every granule, few tokens and many."""
    check(compiled(tmp_path, processor))
