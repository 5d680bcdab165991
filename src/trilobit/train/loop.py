"""The training loop: one for `tune` and `pretrain`, in one process or on every rank of several (mesh.py).

A step is: λ and learning rate from the tokens seen → micro-batches forward and backward → clip → refuse what is not
finite → update → log. Latents are fp32 always (in bf16 most updates round to zero), gradients and moments unless they are
asked to be narrower (adamw.py); compute is bf16 under autocast, or fp32 (precision.py). Nothing in a step waits for the
device except logging: a non-finite loss or gradient is noticed on the device, which from then on skips every update, and is
reported at the next log line.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trilobit.config.training import TrainingConfig
from trilobit.errors import LAST_UPDATE, NonFiniteError, OutputError
from trilobit.nn.ternary import kept_codes
from trilobit.train.adamw import AdamW
from trilobit.train.checkpoint import Progress
from trilobit.train.distill import Losses
from trilobit.train.distributed import Ranks, parts_of_step
from trilobit.train.layers import one_sequence_a_row
from trilobit.train.mesh import Spread
from trilobit.train.muon import Muon, hidden_matrices
from trilobit.train.pace import Pace
from trilobit.train.pieces import Piece
from trilobit.train.schedule import learning_rate
from trilobit.train.sharded_checkpoint import Checkpoints
from trilobit.train.sharded_muon import ShardedMuon
from trilobit.train.signals import INSISTING, Interrupted, Signals
from trilobit.train.windows import Windows

BETAS = (0.9, 0.95)
LOG_SECONDS = 0.5  # on an accelerator, at most this often does a step wait for its numbers


class Objective(Protocol):
    """Losses of a micro-batch of token windows [B, T + 1], under the precision the loop has set."""

    def __call__(self, windows: Tensor, /) -> Losses: ...


@dataclass
class Hooks:
    """What a command adds to the loop. All are optional."""

    before_step: Callable[[int], dict[str, float]] = lambda tokens: {}
    """Given the tokens seen, sets what depends on them; what it returns is logged."""
    evaluate: Callable[[], dict[str, float]] | None = None
    watch: Callable[[], Callable[[], dict[str, Any]]] | None = None
    """Called before a step that is followed by an evaluation; what it returns is called after it, for more of that row."""
    log: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)


@one_sequence_a_row()
def fit(
    model: nn.Module, windows: Windows, objective: Objective, config: TrainingConfig, peak_lr: float, run: Path,
    device: torch.device, signals: Signals, hooks: Hooks, spread: Spread | None = None,
) -> Progress:  # fmt: skip
    """Train `model` in place for config.steps steps, continuing from the newest checkpoint of `run` if there is one.

    spread: the model over several ranks, all of which call this; then `objective` calls spread.forward, log.jsonl and the
    hooks' logs are rank 0's, and a signal to any rank stops all of them after the same step.

    Raises NonFiniteError before the update that a non-finite loss or gradient would have spoilt, and Interrupted after saving
    when a signal arrived. Appends one row a step to log.jsonl (accelerators: one each half second).
    """
    spread = spread or Spread(model)
    team = spread.team
    optimizer = make_optimizer(model, peak_lr, config, spread)
    checkpoints = Checkpoints(run, optimizer, spread, config.keep_checkpoints)
    progress = checkpoints.load()
    if progress.step == 0:
        torch.manual_seed(config.seed)  # dropout, where a model has it
    log_path = run / "log.jsonl"
    if team.first:
        _forget_rows_after(log_path, progress.step)

    guard, pace = _Guard(device), Pace(saved=progress.step)
    signals.outlook = pace.outlook
    eval_every = config.eval_every or max(config.max_tokens // 10, 1)
    checkpoint_every = config.checkpoint_every or max(config.max_tokens // 4, 1)
    samples_per_step = config.accumulation * config.micro_batch
    started = time.perf_counter() - progress.seconds
    timed_tokens, timed_at = progress.tokens, time.perf_counter()
    model.train()
    while progress.step < config.steps:
        last = progress.step + 1 == config.steps
        before, after = progress.tokens, (progress.step + 1) * config.tokens_per_step
        evaluation_due = last or after // eval_every > before // eval_every
        checkpoint_due = last or after // checkpoint_every > before // checkpoint_every
        pace.begin(evaluation_due)
        values = hooks.before_step(progress.tokens)
        watched = hooks.watch() if hooks.watch and evaluation_due else None
        lr = learning_rate(config, peak_lr, progress.tokens)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if team.size > 1:  # dropout again: of this rank's own, and nothing that a checkpoint would have to remember
            torch.manual_seed(hash((config.seed, progress.step, team.rank)))
        first = progress.step * samples_per_step
        losses = _accumulate(objective, windows, first, config, device, spread)
        norm = spread.clip(config.clip)
        guard.admit(losses["loss"], norm, progress.step, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step, progress.tokens = progress.step + 1, after
        # What is evaluated or saved was checked first: a checkpoint past a step that was held back would skip its batch.
        now = time.perf_counter()
        wanted = team.first and now - timed_at > LOG_SECONDS
        number, wanted = team.agree(signals.number or 0, int(wanted))
        stopping = number > 0
        due = evaluation_due or checkpoint_due or stopping

        if device.type == "cpu" or due or wanted:
            if guard.noticed():  # on all ranks: loss and norm are those of the whole step
                checkpoints.settle()
                raise guard.error(windows, config, peak_lr, hooks.before_step)
            now = time.perf_counter()
            row = {"step": progress.step, "tokens": progress.tokens, **{k: v.item() for k, v in losses.items()}}
            row |= {"lr": lr, **values, "gradient_norm": norm.item()}
            if isinstance(optimizer, Muon):
                row["matrices_iterated"] = optimizer.iterated  # by this rank
            row["tokens_per_second"] = round((progress.tokens - timed_tokens) / (now - timed_at), 1)
            timed_tokens, timed_at = progress.tokens, now
            pace.end("the evaluation in progress" if evaluation_due else "the step that follows")
            if evaluation_due:
                row |= watched() if watched else {}
                try:
                    row |= hooks.evaluate() if hooks.evaluate else {}
                except NonFiniteError:
                    checkpoints.settle()
                    raise
                timed_at = time.perf_counter()
                (number,) = team.agree(signals.number or 0)  # one that came meanwhile
                stopping = number > 0
            row["seconds"] = round(time.perf_counter() - started, 3)
            if team.first:
                _append(log_path, row)
                for listen in hooks.log:
                    listen(row)
        if checkpoint_due or stopping:
            progress.seconds = time.perf_counter() - started
            broken = _not_finite(spread)
            if team.agree(int(bool(broken)))[0]:
                checkpoints.settle()
                where = broken or "a weight on another rank"
                raise NonFiniteError(f"after step {progress.step} {where} is not finite. {LAST_UPDATE}")
            checkpoints.save(progress)
            pace.saved = progress.step
            timed_at = time.perf_counter()
            if stopping and not last:
                checkpoints.settle()
                team.agree(0)  # nobody leaves while another still asks the store how it went
                raise Interrupted(number, agreed=True, saved=progress.step)
    checkpoints.settle()
    signals.outlook = lambda: f"the run stops as soon as it can, all steps are done; {INSISTING} (--resume finishes it)"
    progress.seconds = time.perf_counter() - started
    return progress


def make_optimizer(model: nn.Module, lr: float, config: TrainingConfig, spread: Spread | None = None) -> torch.optim.Optimizer:
    """Fused AdamW over every parameter once, or Muon over the decoder's matrices and AdamW over the others; weight decay on
    matrices only. Of a model that is spread over ranks it steps the rows that this one keeps."""
    spread = spread or Spread(model)
    pieces = [piece for piece in spread.pieces if piece.parameter.requires_grad]
    assert all(p.local.dtype in (torch.float32, torch.float64) for p in pieces), "latent weights are fp32, always"
    if config.gradients == "bf16":
        for piece in pieces:
            piece.parameter.grad_dtype = torch.bfloat16
    routed = {id(p) for p in muon_matrices(model, config)} if config.optimizer == "muon" else set()
    assert routed <= {id(piece.parameter) for piece in pieces}, "a matrix of Muon's is not among what is trained"
    matrices = [piece.local for piece in pieces if id(piece.parameter) in routed]
    others = [piece for piece in pieces if id(piece.parameter) not in routed]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "muon": True},
        {"params": [p.local for p in others if _decays(p)], "weight_decay": config.weight_decay, "muon": False},
        {"params": [p.local for p in others if not _decays(p)], "weight_decay": 0.0, "muon": False},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "muon":
        options: dict[str, Any] = {
            "coefficients": config.muon_coefficients, "scale": config.muon_scale, "normuon": config.normuon,
            "state": config.optimizer_state, "offload": config.offload,
        }  # fmt: skip
        if pieces[0].local.dtype == torch.float64:
            options["compute"] = torch.float64
        if isinstance(spread.team, Ranks) and spread.shard_group is not None:
            return ShardedMuon(groups, lr, BETAS, spread.pieces, spread.shard_group, spread.team.control, **options)
        return Muon(groups, lr, BETAS, **options)
    return AdamW(groups, lr, BETAS, state=config.optimizer_state, offload=config.offload)


def _decays(piece: Piece) -> bool:
    """Whether weight decay is for it: a matrix, and neither a bias (those of experts are [E, R]) nor a state space's decay."""
    return piece.local.ndim >= 2 and not piece.name.endswith(("bias", ".A_log"))


def muon_matrices(model: nn.Module, config: TrainingConfig) -> list[nn.Parameter]:
    """What Muon trains: the decoder's matrices and embedding projections, and embedding and head where that is asked for."""
    matrices = hidden_matrices(model)
    if config.muon_embeddings:
        ends = [module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.Linear)]
        known = {id(p) for p in matrices}
        matrices += [p for p in dict.fromkeys(ends) if id(p) not in known and isinstance(p, nn.Parameter) and p.requires_grad]
    return matrices


def autocast(config_precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast where the precision, no longer `auto`, asks for it. (On CPU fp16 is slower by two orders of magnitude.)"""
    assert config_precision in ("fp32", "bf16"), f"{config_precision} is for a run to decide (precision.py)"
    return torch.autocast(device.type, torch.bfloat16, enabled=config_precision == "bf16")


def _accumulate(
    objective: Objective, windows: Windows, first: int, config: TrainingConfig, device: torch.device, spread: Spread
) -> dict[str, Tensor]:
    """Forward and backward over this rank's micro-batches of one step; gradients are left in place. Returns the mean losses
    over all tokens of the step, whoever read them, on device."""
    totals: dict[str, Tensor] = {}
    batches = parts_of_step(config, spread.team.rank, spread.team.size)
    own = sum(number for _, number in batches)
    with kept_codes(spread.model) if len(batches) > 1 else nullcontext():
        for start, number in batches:
            batch = windows.samples(first + start, number)
            batch = batch.pin_memory() if device.type == "cuda" else batch  # else the copy would wait
            with spread.micro_batch((start, number) == batches[-1]):
                with autocast(config.precision, device):
                    losses = objective(batch.to(device, non_blocking=True))
                (losses.total / (own / number)).backward()
            parts = {"loss": losses.total.detach(), "cross_entropy": losses.cross_entropy, "divergence": losses.divergence}
            parts |= {"relations": losses.relations, "hidden": losses.hidden}
            for name, value in parts.items():
                if value is not None:
                    share = value / (own / number)
                    totals[name] = totals[name] + share if name in totals else share
    return spread.team.means(totals)


@torch.no_grad()
def _not_finite(spread: Spread) -> str:
    """The name of the first parameter that is not finite in the rows that this rank keeps; "" if there is none."""
    fine = torch.stack([piece.local.isfinite().all() for piece in spread.pieces])
    return "" if bool(fine.all()) else spread.pieces[int((~fine).nonzero()[0])].name


class _Guard:
    """Remembers, on the device, the first step whose loss or gradient was not finite, and holds back updates from it on."""

    def __init__(self, device: torch.device):
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)

    def admit(self, loss: Tensor, norm: Tensor, step: int, optimizer: torch.optim.Optimizer) -> None:
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        new = bad & (self.bad_step < 0)
        self.bad_step = torch.where(new, step, self.bad_step)
        self.loss, self.norm = torch.where(new, loss, self.loss), torch.where(new, norm, self.norm)
        # The fused optimizers skip their update on the device where found_inf is one (as they do for a GradScaler).
        optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.found_inf = (self.bad_step >= 0).float()  # pyright: ignore[reportAttributeAccessIssue]

    def noticed(self) -> bool:
        """Whether any step was bad. Waits for the device."""
        return bool(self.bad_step >= 0)

    def error(
        self, windows: Windows, config: TrainingConfig, peak_lr: float, settings: Callable[[int], dict[str, float]]
    ) -> NonFiniteError:
        """What was bad, with the settings of that step (on an accelerator it is noticed some steps later)."""
        step = int(self.bad_step)
        tokens = step * config.tokens_per_step
        values = {"lr": learning_rate(config, peak_lr, tokens), **settings(tokens)}
        what = "loss" if not math.isfinite(self.loss.item()) else "gradient"
        first = step * config.accumulation * config.micro_batch
        state = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        return NonFiniteError(
            f"step {step + 1}: the {what} is not finite (loss {self.loss.item()}, gradient norm {self.norm.item()}; {state}). "
            f"Its batch is samples {first} to {first + config.accumulation * config.micro_batch - 1} of the seed-"
            f"{config.seed} order ({windows.count} windows). The weights were not updated. Try a lower --lr."
        )


def _forget_rows_after(path: Path, step: int) -> None:
    """Drop the log rows of steps that will be run again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Make room and try again.") from error


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Make room and continue with --resume.") from error
