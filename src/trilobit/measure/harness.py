"""lm-eval with our models: the same requests, batches and arithmetic as its own `hf` backend, so the same scores.

HFLM is given the model that trilobit.load returns. All that differs from lm-eval's own command is around it:

- HFLM ties the weights of the model it gets. Ours are tied, and a packed embedding has no weight to tie: it is kept from it.
- Prompts longer than the model's positions lose their beginnings, as in lm-eval; they are counted and reported.
- What lm-eval draws and prints goes to the listener: it has no switch for its bars, and a bootstrap prints to stdout, where
  --json has its one object. Standard errors of means are lm-eval's; the others (perplexity, F1) come from 1,000 resamples
  in this process instead of 100,000 in a pool of them.

Chance is the mean of 1/choices over the questions asked, 0 where an answer is written freely, and unknown for other metrics.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from numbers import Real
from statistics import fmean
from typing import Any

import lm_eval
import lm_eval.api.metrics
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch

from trilobit.errors import ModelError
from trilobit.infer.loaded import Loaded
from trilobit.infer.quiet import quiet_transformers
from trilobit.listener import Listener
from trilobit.measure.scores import TaskScore
from trilobit.measure.tasks import Tasks, replaced

HFLM: Any = lm_eval.models.huggingface.HFLM  # decorators hide the types of both
evaluate: Any = lm_eval.evaluate
BACKEND = f"lm-eval {lm_eval.__version__}"
SEED = 1234  # lm-eval's own, for the choice of examples
RESAMPLES = 1000
GENERATED = 256  # tokens that HFLM generates unless a task says otherwise
GUESSED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")  # metrics that guessing has a chance at


@dataclass(frozen=True)
class Scores:
    """What lm-eval measured, and how fast. truncated: prompts that were longer than the model's positions."""

    rows: list[TaskScore]
    questions: int
    seconds: float
    truncated: int
    dtype: str


def score(loaded: Loaded, tasks: Tasks, sequences: int, limit: int | None, listener: Listener) -> Scores:
    """Ask the model all questions in one pass, as `lm_eval` does. Raises ModelError if it cannot answer them."""
    with _through(listener):
        model = Harness(loaded, sequences)
        for name, task in tasks.leaves.items():
            _require_room(name, task, model)
            task.set_fewshot_seed(SEED)
        start = time.perf_counter()
        asked = {"tasks": tasks.leaves, "groups": tasks.groups}
        found = evaluate(model, asked, limit=limit, log_samples=False, bootstrap_iters=RESAMPLES)
        seconds = time.perf_counter() - start
    chances = {name: chance(task) for name, task in tasks.leaves.items()}
    for name, group in tasks.groups.items():
        known = {chances[leaf.task_name] for leaf in group.get_all_tasks()}
        chances[name] = known.pop() if len(known) == 1 else None
    rows = [row for name in [*tasks.groups, *tasks.leaves] for row in _rows(name, found, chances[name])]
    questions = sum(found["n-samples"][name]["effective"] for name in tasks.leaves)
    return Scores(rows, questions, seconds, model.truncated, str(loaded.model.dtype).removeprefix("torch."))


def chance(task: Any) -> float | None:
    """What guessing scores on the questions that were asked; None where that is not known."""
    if callable(task.get_config("process_results")):
        return None
    if task.OUTPUT_TYPE in ("generate_until", "loglikelihood"):
        return 0.0
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_target:
        return None
    requests = Counter(instance.doc_id for instance in task.instances)
    twice = 2 if "acc_mutual_info" in task.aggregation() else 1  # it asks for each choice without its question, too
    return fmean(twice / count for count in requests.values())


def _rows(name: str, found: Any, guessed: float | None) -> Iterator[TaskScore]:
    """One row per metric and filter; a group's values are numpy's."""
    values = found["results"][name]
    for key, value in values.items():
        metric, _, of = key.partition(",")
        if not of or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        error, guess = values.get(f"{metric}_stderr,{of}"), guessed if metric in GUESSED else None
        yield TaskScore(
            task=name,
            metric=metric if of == "none" else key,
            score=float(value),
            stderr=float(error) if isinstance(error, Real) else None,
            chance=guess,
            examples=values["sample_len"],
            shots=found["n-shot"].get(name),
            version=str(found["versions"].get(name)),
        )


def _require_room(name: str, task: Any, model: "Harness") -> None:
    if task.OUTPUT_TYPE != "generate_until":
        return
    settings = task.get_config("generation_kwargs") or {}
    longest = settings.get("max_gen_toks", settings.get("max_new_tokens", GENERATED))
    if longest >= model.max_length:
        raise ModelError(
            f"{name} lets a model write {longest} tokens; this one has {model.max_length} positions. Leave it out of --tasks."
        )


class Harness(HFLM):
    """HFLM around a model of ours; counts the prompts whose beginnings it cuts off."""

    def __init__(self, loaded: Loaded, sequences: int):
        if loaded.tokenizer.bos_token_id is None and loaded.tokenizer.eos_token_id is None:
            raise ModelError("--tasks: the tokenizer has neither a beginning-of-text nor an end-of-text token.")
        with replaced(loaded.model, "tie_weights", lambda: None):
            super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=sequences)
        self.truncated = 0

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **settings: Any) -> Any:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ModelError(f"an answer has {longest} tokens; the model has {self.max_length} positions.")
        self.truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, *arguments, **settings)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            self.truncated += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask


@contextmanager
def _through(listener: Listener) -> Iterator[None]:
    """What lm-eval would draw goes to the listener, what it would print to stderr."""

    def bar(*arguments: Any, **settings: Any) -> "Progress":
        return Progress(listener, *arguments, **settings)

    with ExitStack() as stack:
        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            stack.enter_context(replaced(module, "tqdm", bar))
        stack.enter_context(replaced(lm_eval.api.metrics, "bootstrap_stderr", bootstrap_stderr))
        stack.enter_context(quiet_transformers())
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


class Progress:
    """Stands in for tqdm's bars."""

    def __init__(self, listener: Listener, iterable: Iterable[Any] = (), total: int | None = None, desc: str = "", **_: Any):
        self.listener, self.iterable, self.what = listener, iterable, desc or "Building prompts"
        self.total = len(iterable) if total is None and isinstance(iterable, Sequence) else total or 0
        self.done, self.start = 0, time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.done += count
        self.listener.progress(self.what, self.done, self.total, time.perf_counter() - self.start)

    def close(self) -> None: ...


def bootstrap_stderr(f: Callable[[Sequence[Any]], float], xs: Sequence[Any], iters: int) -> float:
    """lm-eval's function of this name, for one chunk of at most 1,000 resamples, without processes, bars and prints."""
    draw = random.Random(0)
    return lm_eval.api.metrics.sample_stddev([f(draw.choices(xs, k=len(xs))) for _ in range(min(iters, RESAMPLES))])
