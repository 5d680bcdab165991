"""`trilobit eval --tasks` against lm-eval's own `hf` backend: the same scores to the last digit, and at what speed.

    python bench/tasks.py MODEL --task-data DIR [--tasks hellaswag,piqa] [--limit 200] [--rounds 2] [--precision fp32]

Both read the same files and batch alike; each round runs one after the other in one process. The speed is questions per
second, from building the prompts to the last score; the ratio is the median over rounds. Exits 1 if a score differs.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM

from trilobit.config.eval import EvalConfig
from trilobit.measure.evaluate import run
from trilobit.measure.tasks import write_definitions

Found = dict[tuple[str, str], float]


def peer(arguments: argparse.Namespace) -> tuple[Found, float]:
    """Scores and questions per second of lm-eval's backend, which loads the model by itself."""
    with tempfile.TemporaryDirectory() as place:
        definitions = write_definitions(Path(place), Path(arguments.task_data))
        names = [str(definitions[name]) for name in arguments.tasks.split(",")]
        loaded: Any = lm_eval.tasks.TaskManager(include_defaults=False).load(names)
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[arguments.precision]
        model = HFLM(pretrained=arguments.model, dtype=dtype, batch_size=arguments.sequences, device="cpu")
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(1234)
        start = time.perf_counter()
        found: Any = lm_eval.evaluate(model, loaded, limit=arguments.limit, log_samples=False, bootstrap_iters=0)
        seconds = time.perf_counter() - start
    rows = [(name, key, value) for name, row in found["results"].items() for key, value in row.items()]
    scores = {(n, k.removesuffix(",none")): v for n, k, v in rows if "," in k and "_stderr" not in k}
    return scores, sum(row["effective"] for row in found["n-samples"].values()) / seconds


def ours(arguments: argparse.Namespace) -> tuple[Found, float]:
    result = run(
        EvalConfig(
            model=arguments.model, tasks=arguments.tasks, task_data=arguments.task_data, limit=arguments.limit,
            sequences=arguments.sequences, precision=arguments.precision, device="cpu",
        )
    )  # fmt: skip
    assert result.tasks is not None and result.examples_per_second is not None
    return {(row.task, row.metric): row.score for row in result.tasks}, result.examples_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task-data", required=True)
    parser.add_argument("--tasks", default="hellaswag,piqa")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    speeds: list[tuple[float, float]] = []
    scores: list[tuple[Found, Found]] = []
    for _ in range(arguments.rounds):
        (own, own_speed), (theirs, their_speed) = ours(arguments), peer(arguments)
        scores.append((own, theirs))
        speeds.append((own_speed, their_speed))
    own, theirs = scores[0]
    print(f"{'task':<18}{'metric':<12}{'trilobit':>22}{'lm-eval hf':>22}")
    for key in sorted(own.keys() | theirs.keys()):
        print(f"{key[0]:<18}{key[1]:<12}{own.get(key)!r:>22}{theirs.get(key)!r:>22}")
    ratio = statistics.median(a / b for a, b in speeds)
    a, b = (statistics.median(values) for values in zip(*speeds, strict=True))
    print(f"examples/s: trilobit {a:.2f}, lm-eval hf {b:.2f}, ratio {ratio:.3f} (median of {arguments.rounds})")
    raise SystemExit(0 if all(x == y for x, y in scores) else "the scores differ")


if __name__ == "__main__":
    main()
