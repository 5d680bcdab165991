"""The read roof that every fraction of memory's speed is of, beside what likwid-bench reads on the same machine in turns.

    python bench/roof.py [--likwid likwid-bench] [--rounds 5]

Ours: AVX-512 loads with prefetch on huge pages over 1 GiB (native/floats.cpp), at one thread up to all, the best of three.
likwid-bench (Debian's package `likwid`): its kernel load_avx512 over 1 GB on as many threads. Medians over rounds, GB/s.
"""

import argparse
import os
import re
import statistics
import subprocess
import time

from trilobit.kernels import native

BYTES = 1 << 30


def ours(area: object, threads: int) -> float:
    """Bytes a second."""

    def once() -> float:
        start = time.perf_counter()
        native.read(area, threads=threads)  # pyright: ignore[reportArgumentType]
        return BYTES / (time.perf_counter() - start)

    return max(once() for _ in range(3))


def likwid(command: str, threads: int) -> float:
    """Bytes a second, as it prints them (MByte/s, decimal)."""
    run = [command, "-t", "load_avx512", "-w", f"N:1GB:{threads}", "-s", "1"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    found = re.search(r"MByte/s:\s+([0-9.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--likwid", default="likwid-bench")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    area = native.huge_pages(BYTES).fill_(1)
    print("| threads | trilobit, GB/s | likwid-bench load_avx512, GB/s |\n|---|---|---|")
    for threads in range(1, (os.cpu_count() or 1) + 1):
        pairs = [(ours(area, threads), likwid(arguments.likwid, threads)) for _ in range(arguments.rounds)]
        a, b = (statistics.median(column) / 1e9 for column in zip(*pairs, strict=True))
        print(f"| {threads} | {a:.1f} | {b:.1f} |", flush=True)


if __name__ == "__main__":
    main()
