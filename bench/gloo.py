"""FSDP2's two collectives on CPUs: gloo's own beside train/gloo.py's sends and receives.

    torchrun --standalone --nproc-per-node 2 bench/gloo.py [--rounds 30]

Milliseconds, medians, ways interleaved, ranks brought together before each; sizes are of what is whole at each rank.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from trilobit.train.gloo import GatherParts, ScatterSums


def seconds(call: Callable[[], object]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(number: int, rounds: int) -> None:
    """Parts of so many numbers."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    whole, values, mine = torch.empty(size * number), torch.randn(size * number), torch.empty(number)
    part = whole[rank * number : (rank + 1) * number].normal_()
    gather, scatter = GatherParts(), ScatterSums()
    calls: dict[str, Callable[[], object]] = {
        "all-gather, gloo's": lambda: dist.all_gather_into_tensor(whole, part),
        "all-gather, ours": lambda: gather(whole, part, group),
        "reduce-scatter, gloo's": lambda: dist.reduce_scatter_tensor(mine, values),
        "reduce-scatter, ours": lambda: scatter(mine, values, group, dist.ReduceOp.SUM),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            found[name].append(seconds(call))
    for name, times in found.items():
        if rank == 0:
            megabytes, median = whole.nbytes / 1e6, 1000 * statistics.median(times[1:])
            print(f"{size} ranks, {megabytes:.1f} MB, {name:<24}{median:>8.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number in (300_000, 2_400_000):
        measure(number, rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
