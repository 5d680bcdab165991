"""The native CPU kernels against what this machine can do: GB/s of packed weights and int8 TOP/s, beside measured roofs.

    python bench/native.py [--threads 1] [--rounds 5] [--megabytes 256]

Read roof: 64-byte loads that stream through memory. Peak: vpdpbusd on registers alone. Both are measured in every round
between the kernels, as neighbours move them; a figure is the median over rounds, a fraction the median of its rounds' own.
Matrix–vector (GB/s): width 2560, packed weights in the second-level cache, and --megabytes of them in memory.
Matrix–matrix (TOP/s): 2560 × 2560 at 32, 128 and 512 tokens. Needs a compiler, and AVX-512 for the roofs.
"""

import argparse
import ctypes
import mmap
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trilobit.kernels import build, native
from trilobit.kernels.native import Format, PackedMatrix

WIDTH = 2560
CACHED_BYTES = 640 << 10
TOKENS = (32, 128, 512)
FORMS: list[Format] = ["two-bit", "base-3", "int8"]


def helper() -> ctypes.CDLL:
    """bench/native.cpp, compiled and loaded."""
    compiler = build.compiler()
    assert compiler is not None, build.why_not()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.so"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run([compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-w", str(source), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    for name in ("read_seconds", "peak_operations", "product_seconds"):
        getattr(library, name).restype = ctypes.c_double
    return library


def memory(size: int) -> Tensor:
    """Written memory on huge pages where the system has them, [size] uint8."""
    area = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8).fill_(0b01010101)


def matrix(form: Format, size: int, data: Tensor) -> PackedMatrix:
    """As many rows of WIDTH as fit into `size` bytes of `data` (whose bytes are valid in every layout)."""
    panel = native.packed_bytes(form, 32, WIDTH)
    panels = max(1, size // panel)
    return PackedMatrix(data[: panels * panel], panels * 32, WIDTH, 0, form)


def processor() -> str:
    """Its name, as the system gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    arguments = parser.parse_args()
    build.build()
    library, kernels = helper(), native._loaded()
    assert "avx512" in kernels.sets, "the roofs need AVX-512"
    big = memory(arguments.megabytes << 20)
    instructions = [name for name in native.instruction_sets() if name != "scalar"]

    def seconds(m: PackedMatrix, tokens: int, name: str, repeats: int) -> Callable[[], float]:
        x = torch.randint(-127, 128, (tokens, WIDTH), dtype=torch.int8)
        y = torch.zeros(tokens, m.rows, dtype=torch.int32)

        def run() -> float:
            return library.product_seconds(
                kernels.functions["product"], native._reference(m), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(tokens),
                ctypes.c_void_p(y.data_ptr()), kernels.sets[name], arguments.threads, repeats,
            )  # fmt: skip

        return run

    def read() -> float:
        return big.numel() / library.read_seconds(ctypes.c_void_p(big.data_ptr()), ctypes.c_int64(big.numel()), 1)

    vector: dict[tuple[str, str, str], tuple[int, Callable[[], float]]] = {}
    product: dict[tuple[str, str, int], tuple[int, Callable[[], float]]] = {}
    for form in FORMS:
        small, large = matrix(form, CACHED_BYTES, big), matrix(form, big.numel(), big)
        square = matrix(form, native.packed_bytes(form, WIDTH, WIDTH), big)
        for name in instructions:
            vector[form, name, "L2"] = small.data.numel(), seconds(small, 1, name, 100)
            vector[form, name, "memory"] = large.data.numel(), seconds(large, 1, name, 1)
            for tokens in TOKENS:
                operations = 2 * square.rows * WIDTH * tokens
                product[form, name, tokens] = operations, seconds(square, tokens, name, max(1, 64 // tokens))

    roofs: list[tuple[float, float]] = []
    speeds: dict[tuple, list[tuple[float, float]]] = {key: [] for key in [*vector, *product]}
    for _ in range(arguments.rounds):
        for form in FORMS:
            roof, peak = read(), library.peak_operations(20) * arguments.threads
            roofs.append((roof, peak))
            for key, (size, run) in vector.items():
                if key[0] == form:
                    speed = size / run()
                    speeds[key].append((speed, speed / roof))
            for key, (operations, run) in product.items():
                if key[0] == form:
                    speed = operations / run()
                    speeds[key].append((speed, speed / peak))

    def cell(key: tuple, unit: float, digits: int) -> str:
        speed, fraction = (statistics.median(column) for column in zip(*speeds[key], strict=True))
        return f"{speed / unit:.{digits}f} ({fraction:.2f})"

    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}")
    roof, peak = (statistics.median(column) for column in zip(*roofs, strict=True))
    print(f"{arguments.threads} thread(s); read roof, one thread: {roof / 1e9:.1f} GB/s; peak {peak / 1e12:.2f} TOP/s; "
          f"in brackets the fraction of the roof or peak of the same round\n")  # fmt: skip
    columns = ["layout", "instructions", "GB/s in L2", "GB/s from memory", *(f"TOP/s, {tokens} tokens" for tokens in TOKENS)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for form in FORMS:
        for name in instructions:
            cached = statistics.median(speed for speed, _ in speeds[form, name, "L2"]) / 1e9
            cells = [f"{cached:.1f}", cell((form, name, "memory"), 1e9, 1)]
            cells += [cell((form, name, tokens), 1e12, 2) for tokens in TOKENS]
            print(f"| {form} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
