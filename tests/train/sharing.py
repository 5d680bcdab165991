"""What the ranks of tests/train/test_mesh.py do: a small ternary Llama of odd shapes, trained by the loop on every mesh."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from families import build
from trilobit import quant
from trilobit.config.training import Gather, TrainingConfig
from trilobit.config.tune import TuneConfig
from trilobit.errors import NonFiniteError
from trilobit.surgery.outlier_safe import outlier_safe
from trilobit.surgery.ternary import TernarySpec, set_strengths, ternarize
from trilobit.train import loop
from trilobit.train.adamw import State
from trilobit.train.distributed import ALONE, Team
from trilobit.train.gloo import GatherParts, ScatterSums
from trilobit.train.head_loss import LateHead
from trilobit.train.layers import prepare_layers
from trilobit.train.loop import Hooks, fit, make_optimizer
from trilobit.train.meeting import open_team
from trilobit.train.mesh import Arrangement, Spread, arrange, spread_over
from trilobit.train.objective import NextToken, TuneObjective
from trilobit.train.pieces import Piece, heights
from trilobit.train.sharded_checkpoint import Checkpoints
from trilobit.train.sharded_muon import ShardedMuon, gathered, owned
from trilobit.train.signals import Interrupted, Signals
from trilobit.train.windows import Windows

CPU = torch.device("cpu")
LENGTH, SAMPLES, STEPS = 7, 4, 20
SHAPES = {  # rows 18, 6, 27, 37 and 1 over 2 and 4 ranks: uneven parts, and empty ones
    "vocab_size": 37, "hidden_size": 18, "intermediate_size": 27, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to train: an optimizer, a precision, a number of steps."""

    name: str
    optimizer: Any
    dtype: torch.dtype
    normuon: bool = False
    tied: bool = False
    steps: int = STEPS
    dropout: float = 0.0
    state: State = "fp32"
    compiled: bool = False
    late: bool = False  # the head's product together with the loss


CASES = [
    Case("muon", "muon", torch.float64),
    Case("normuon-tied", "muon", torch.float64, normuon=True, tied=True, steps=10),
    Case("adamw", "adamw", torch.float64, steps=10),
    Case("adamw-fp32", "adamw", torch.float32, steps=10),
    # Iterates in bf16, which magnifies last bits: after ten steps one process is 4 % from itself with its batch cut otherwise.
    Case("muon-fp32", "muon", torch.float32, steps=2),
    Case("muon-int8", "muon", torch.float64, steps=10, state="int8"),
    Case("late-head", "adamw", torch.float64, steps=6, late=True),
    Case("late-head-tied", "adamw", torch.float64, steps=6, late=True, tied=True),
]
COMPILED = Case("compiled", "muon", torch.float64, steps=3, compiled=True)
TRIED: dict[int, list[tuple[str, Gather, int]]] = {  # on so many ranks: two accumulate two micro-batches a step
    2: [
        ("fsdp", "layer", 0), ("fsdp", "step", 0), ("ddp", "layer", 0), ("fsdp", "step", 1), ("fsdp", "layer", 4),
        ("fsdp", "layer", 5), ("fsdp", "layer", 6), ("ddp", "layer", 6), ("fsdp", "step", 7), ("ddp", "layer", 7),
    ],
    4: [("fsdp", "layer", 0), ("hsdp:2x2", "layer", 0), ("hsdp:2x2", "step", 0), ("ddp", "layer", 2), ("fsdp", "step", 3),
        ("hsdp:2x2", "step", 3),
        ("fsdp", "layer", 4)],
}  # fmt: skip


def settings(case: Case, **changes: Any) -> TrainingConfig:
    config = TrainingConfig(
        data="d", max_tokens=STEPS * SAMPLES * LENGTH, batch_tokens=SAMPLES * LENGTH, sequence_length=LENGTH,
        sequences=1, optimizer=case.optimizer, normuon=case.normuon, optimizer_state=case.state, weight_decay=0.1, clip=0.5,
        precision="fp32", device="cpu", seed=5,
        eval_every=10**9, checkpoint_every=10**9, warmup_fraction=0.0,
    )  # fmt: skip
    return replace(config, **changes)


def model_of(case: Case) -> Any:
    model = build("llama", tied=case.tied, attention_dropout=case.dropout, **SHAPES).train()
    # Norms of transformers compute in fp32 whatever they are given and magnify last bits of fp64; single-scale ones do not.
    for gain in (p for p in model.parameters() if p.ndim == 1):
        nn.init.ones_(gain)
    outlier_safe(model, ssnorm=True, embproj=not case.tied)
    # A norm behind a norm of one scale would leave that scale a gradient of nothing but rounding.
    ternarize(model, TernarySpec(placement="output", gain="scalar" if case.tied else "vector"))
    generator = torch.Generator().manual_seed(9)  # an orthogonal matrix may have other last bits in another process
    for matrix in (p for p in model.parameters() if p.ndim == 2):
        nn.init.normal_(matrix, std=0.15, generator=generator)
    return model.to(case.dtype)


@contextmanager
def eager_backend() -> Iterator[None]:
    """What is compiled meanwhile is captured and differentiated as ever, and its operators are run as they are."""
    usual = nn.Module.compile
    nn.Module.compile = lambda self: usual(self, backend="aot_eager")
    try:
        yield
    finally:
        nn.Module.compile = usual


def windows() -> Windows:
    tokens = np.random.default_rng(1).integers(0, SHAPES["vocab_size"], 4001).astype(np.uint16)
    return Windows(tokens, LENGTH, seed=5)


def train(
    case: Case, run: Path, team: Team = ALONE, mesh: str = "auto", signals: Signals | None = None, stop_at: int | None = None,
    before: Callable[[int], None] = lambda step: None, gather: Gather = "layer", **changes: Any,
) -> tuple[Spread, Any, Any]:  # fmt: skip
    """λ from 0 over 0.5 to 1, everything as in a run. Returns the spread, the whole model and the rows of the log."""
    model, signals, rows = model_of(case), signals or Signals(), []
    config = settings(case, max_tokens=case.steps * SAMPLES * LENGTH, **changes)
    if case.compiled and team.size > 1:
        with eager_backend():
            prepare_layers(model, config, compiled=True)
    arrangement = Arrangement("one", 1, 1, "") if team.size == 1 else arrange(mesh, 1, team.size, team.size, 0, gather)
    spread = spread_over(team, arrangement, model)

    def before_step(tokens: int) -> dict[str, float]:
        step = tokens // config.tokens_per_step
        before(step)
        strength = min(1.0, 0.5 * (5 * step // case.steps))
        set_strengths(model, [strength] * 2, [strength] * 2)
        if step + 1 == stop_at and team.rank == team.size - 1:
            signals.number = 15
        return {"lambda": strength}

    run.mkdir(parents=True, exist_ok=True)
    hooks = Hooks(before_step, log=[rows.append])
    late = LateHead(model, case.late and team.size > 1)
    fit(model, windows(), NextToken(spread.forward, late), config, 0.02, run, CPU, signals, hooks, spread)
    assert not case.late or team.size == 1 or late.proven
    return spread, whole_model(spread, case), rows


def whole_model(spread: Spread, case: Case) -> Any:
    """The trained model in plain parameters; what it began as on all ranks but the first."""
    model = model_of(case)
    trained = spread.gathered(lambda read: {name: read(name) for name, _ in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in (trained or {}).items():
            model.get_parameter(name).copy_(parameter)
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def all_meshes(folder: Path) -> list[str]:
    """What is tried with so many ranks; what rank 0 has in the end is saved as MESH-GATHER-CASE.safetensors."""
    said: list[str] = []
    with open_team(CPU, Signals(), said.append) as team:
        for mesh, gather, index in TRIED[team.size]:
            case, name = CASES[index], f"{mesh}-{gather}-{CASES[index].name}"
            _, model, rows = train(case, folder / name, team, mesh, gather=gather)
            if team.first:
                save_file(parameters(model), folder / f"{name}.safetensors")
            assert len(rows) == (case.steps if team.first else 0)
    return said


def late_distillation(folder: Path) -> float:
    """Losses and gradients of a distilled micro-batch on FSDP2's rows, with both models' heads in the loss and without: the
    largest difference, relative to the largest value."""
    config = TuneConfig(model="m", data="d", sequence_length=LENGTH, sequences=SAMPLES, max_tokens=10**6, lr=1.0)
    with open_team(CPU, Signals(), print) as team:
        model, teacher = (model_of(case).float() for case in CASES[:2])
        spread = spread_over(team, arrange("fsdp", 1, team.size, team.size, 0), model, teacher)
        found = []
        for late in (False, True):
            objective = TuneObjective(config, model, teacher, spread.forward)
            objective.late, objective.late_teacher = LateHead(model, late), LateHead(teacher, late)
            for _ in range(1 + late):  # the first batch proves that a head may be late, and has it late already
                losses = objective(windows().samples(team.rank * SAMPLES, SAMPLES))
                losses.total.backward()
                spread.clip(1e9)
                gradients = [piece.local.grad for piece in spread.pieces]
                for piece in spread.pieces:
                    piece.local.grad = None
                assert losses.divergence is not None
                found.append([losses.total.detach(), losses.divergence, *(g for g in gradients if g is not None and g.numel())])
            assert objective.late.proven == objective.late_teacher.proven == late
            objective.close()
    early, *others = found
    pairs = [pair for other in others for pair in zip(early, other, strict=True)]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-9)).item() for a, b in pairs)


def gloo_exchanges(folder: Path) -> bool:
    """Whether parts gathered and sums scattered are those of gloo's own collectives, to rounding."""
    same = True
    with open_team(CPU, Signals(), print) as team:
        group: Any = torch.distributed.group.WORLD
        generator = torch.Generator().manual_seed(team.rank)
        for number in (0, 1, 7, 1000):
            part = torch.randn(number, generator=generator)
            whole, parts = part.new_empty(team.size * number), [torch.empty_like(part) for _ in range(team.size)]
            mine = whole[team.rank * number : (team.rank + 1) * number].copy_(part)  # as FSDP2 does: a view of the result
            GatherParts()(whole, mine, group)
            torch.distributed.all_gather(parts, part)
            same = same and torch.equal(whole, torch.cat(parts))
            values = torch.randn(team.size * number, generator=generator, dtype=torch.float64)
            for operation in (ReduceOp.SUM, ReduceOp.AVG):
                scattered, summed = torch.empty(number, dtype=torch.float64), values.clone()
                ScatterSums()(scattered, values, group, operation)
                torch.distributed.all_reduce(summed)
                expected = summed.view(team.size, number)[team.rank] / (team.size if operation == ReduceOp.AVG else 1)
                same = same and torch.allclose(scattered, expected, rtol=1e-14, atol=1e-15)
    return bool(same)


class Sent(TorchDispatchMode):
    """Names of the collectives that were begun meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def collectives_of_a_step(folder: Path) -> list[dict[str, int]]:
    """What a step of two micro-batches sends by each way of gathering, and how many parameters are whole after it."""
    found = []
    with open_team(CPU, Signals(), print) as team:
        for gather in ("layer", "step"):
            model = model_of(CASES[2])
            spread = spread_over(team, arrange("fsdp", 1, team.size, team.size, 0, gather), model)
            objective = NextToken(spread.forward)
            with Sent() as sent:
                for last in (False, True):
                    with spread.micro_batch(last):
                        objective(windows().samples(team.rank, 1)).total.backward()
            whole = sum(not isinstance(p, DTensor) for p in model.parameters())
            found.append({"exchanges": sum("send" in name or "alltoall" in name for name in sent.names), "whole": whole})
    return found


def compiled_layers(folder: Path) -> dict[str, int]:
    """Three steps by FSDP2 with compiled layers, λ at 0, ½ and 1; what rank 0 has in the end is saved. How many graphs there
    are, and why any of them broke."""
    with open_team(CPU, Signals(), print) as team:
        _, model, _ = train(COMPILED, folder / "run", team, "fsdp")
        if team.first:
            save_file(parameters(model), folder / "found.safetensors")
    return {"graphs": counters["stats"]["unique_graphs"], **counters["graph_break"]}


def faults(folder: Path) -> None:
    """Two mistakes that sharding invites, planted: an iteration of this rank's rows alone, and a scale of them alone."""

    def local(rows: list[Tensor], shape: torch.Size, first: int, group: Any, iterate: Any) -> list[Tensor]:
        return [iterate(part[None])[0] if part.numel() else part for part in rows]

    plain = quant.absmean_scale
    with open_team(CPU, Signals(), print) as team:

        def of_the_shard(weight: Tensor, granularity: Any = "tensor") -> Tensor:
            part = weight.split(heights(len(weight), team.size))
            return plain(part[min(team.rank, len(part) - 1)], granularity)

        for fault in ("none", "local-iteration", "shard-scale"):
            ShardedMuon.exchange = staticmethod(local if fault == "local-iteration" else owned)
            quant.absmean_scale = of_the_shard if fault == "shard-scale" else plain
            case = replace(CASES[0], steps=6)
            _, model, _ = train(case, folder / fault, team, "fsdp")
            if team.first:
                save_file(parameters(model), folder / f"{fault}.safetensors")


MATRICES = [(6, 8), (6, 8), (6, 8), (9, 4), (1, 5), (3, 7), (5, 3), (2, 2), (6, 8)]
NOBODYS, SOMEONES = 1, 2  # matrices without a gradient anywhere, and on the last rank


def matrices(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in MATRICES]


def gradients(step: int, ranks: int) -> list[Tensor | None]:
    """Of whole matrices. The rows of the last of so many ranks have none of SOMEONES: zero."""
    generator = torch.Generator().manual_seed(100 + step)
    found: list[Tensor | None] = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in MATRICES]
    found[NOBODYS] = None
    some = found[SOMEONES]
    assert some is not None
    if last := heights(len(some), ranks)[-1]:
        some[-last:] = 0
    return found


def sharded_steps(folder: Path) -> dict[str, Any]:
    """Three steps of rows, by owners and by gathering; the rows afterwards are saved as HOW-RANK.safetensors."""
    counts: dict[str, Any] = {}
    with open_team(CPU, Signals(), print) as team:
        for how, exchange in {"owned": owned, "gathered": gathered}.items():
            pieces = []
            for index, matrix in enumerate(matrices()):
                high = heights(len(matrix), team.size)
                start = sum(high[: team.rank])
                local = nn.Parameter(matrix[start : start + high[team.rank]].clone())
                pieces.append(Piece(str(index), local, local, matrix.shape, start, start + len(local)))
            group: Any = torch.distributed.group.WORLD
            optimizer = ShardedMuon(
                [{"params": [piece.local for piece in pieces], "muon": True}], 0.1, (0.9, 0.95), pieces=pieces, group=group,
                control=group, weight_decay=0.1, normuon=True, compute=torch.float64,
            )  # fmt: skip
            optimizer.exchange = exchange
            for step in range(3):
                for piece, gradient in zip(pieces, gradients(step, team.size), strict=True):
                    absent = gradient is None or (int(piece.name) == SOMEONES and team.rank == team.size - 1)
                    piece.local.grad = None if absent or gradient is None else gradient[piece.start : piece.stop].clone()
                optimizer.step()
            counts[how] = optimizer.iterated
            save_file({p.name: p.local.detach() for p in pieces}, folder / f"{how}-{team.rank}.safetensors")
    return counts


DROPPING = Case("muon", "muon", torch.float64, steps=9, dropout=0.2, state="int8")


def interrupted(folder: Path, mesh: str = "fsdp") -> dict[str, Any]:
    """A run to its end; one that the last rank is told to stop after five steps, and its second half."""
    same = True
    with open_team(CPU, Signals(), print) as team:
        every = {"checkpoint_every": 4 * SAMPLES * LENGTH, "keep_checkpoints": 9}
        straight, _, rows = train(DROPPING, folder / "straight", team, mesh, **every)
        signals, stopped = Signals(), 0
        try:
            train(DROPPING, folder / "stopped", team, mesh, signals, stop_at=5, **every)
        except Interrupted as error:
            stopped = error.number
        left = sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir())
        team.agree(0)
        again, _, more = train(DROPPING, folder / "stopped", team, mesh, **every)
        for a, b in zip(straight.pieces, again.pieces, strict=True):
            same = same and torch.equal(a.local, b.local)
    return {"same": same, "stopped": stopped, "left": left, "rows": len(rows), "more": len(more)}


def loaded(folder: Path, checkpoint: str) -> None:
    """What this many ranks read from a checkpoint, each its rows, is saved as read-RANK.safetensors."""
    from trilobit.train.checkpoint import load_checkpoint, optimizer_tensors

    with open_team(CPU, Signals(), print) as team:
        model = model_of(DROPPING)
        spread = spread_over(team, arrange("fsdp", 1, team.size, team.size, 0), model)
        optimizer = make_optimizer(model, 0.02, settings(DROPPING), spread)
        load_checkpoint(Path(checkpoint), model, optimizer, spread.pieces, team.rank, team.size)
        read = {piece.name: piece.local.detach() for piece in spread.pieces} | optimizer_tensors(spread.pieces, optimizer)
        save_file({name: tensor.clone() for name, tensor in read.items()}, folder / f"read-{team.rank}.safetensors")


def one_dies(folder: Path, how: str) -> str:
    """The last rank dies, or stops, before its fourth step; what the others say."""
    from trilobit.errors import RankError
    from trilobit.train import heartbeat

    heartbeat.BEAT, heartbeat.SILENCE = 0.1, 1.0
    rank = int(os.environ["RANK"])

    def before(step: int) -> None:
        if step == 3 and rank == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), getattr(signal, how))

    def say(text: str) -> None:
        (folder / f"said-{rank}").write_text(text)

    try:
        with open_team(CPU, Signals(), say) as team:
            train(CASES[2], folder / "run", team, "fsdp", before=before)
    except RankError as error:
        return str(error)
    return "nothing was noticed"


def not_finite(folder: Path, mesh: str) -> str:
    """What a rank says of a run in which the last one meets a loss of NaN in its third step."""
    plain, seen = NextToken.__call__, []

    def spoilt(self: NextToken, batch: Tensor, /) -> Any:
        losses, rank = plain(self, batch), int(os.environ["RANK"])
        seen.append(rank)
        return replace(losses, total=losses.total * float("nan")) if rank == 1 and len(seen) > 2 * SAMPLES // 2 else losses

    NextToken.__call__ = spoilt
    return said_of(folder, mesh)


def weights_not_finite(folder: Path, mesh: str) -> str:
    """What a rank says of a run in which the second update breaks a weight of the last one, before it is saved."""
    plain = loop.make_optimizer

    def spoilt(model: nn.Module, lr: float, config: TrainingConfig, spread: Spread) -> torch.optim.Optimizer:
        optimizer, steps = plain(model, lr, config, spread), count(1)

        @torch.no_grad()
        def spoil(*_: Any) -> None:
            if next(steps) == 2 and spread.team.rank == 1:
                next(piece.local for piece in spread.pieces if piece.local.numel()).fill_(float("inf"))

        optimizer.register_step_post_hook(spoil)
        return optimizer

    loop.make_optimizer = spoilt
    return said_of(folder, mesh)


def said_of(folder: Path, mesh: str) -> str:
    """What a rank says of a run that saves after every second step, if something in it is not finite."""
    try:
        with open_team(CPU, Signals(), print) as team:
            train(CASES[2], folder / "run", team, mesh, checkpoint_every=2 * SAMPLES * LENGTH)
    except NonFiniteError as error:
        return str(error)
    return "nothing"


def writer_fails(folder: Path) -> str:
    """What a rank says of a checkpoint that the last one's thread cannot write, for a reason nobody foresaw."""
    from trilobit.errors import TrilobitError
    from trilobit.train import sharded_checkpoint

    def full(*arguments: Any) -> None:
        raise MemoryError("no room for a copy")

    try:
        with open_team(CPU, Signals(), print) as team:
            if team.rank == team.size - 1:
                sharded_checkpoint.save_tensors = full
            train(replace(CASES[2], steps=4), folder / "run", team, "fsdp")
    except TrilobitError as error:
        return str(error)
    return "nothing"


def drifting_copies(folder: Path) -> dict[str, Any]:
    """Copies of which one has drifted apart by a last bit, before and after a checkpoint; and what was said."""
    said: list[str] = []
    found: dict[str, Any] = {"said": said}
    with open_team(CPU, Signals(say=said.append), print) as team:
        for mesh in ("ddp", "hsdp:2x2"):
            spread, _, _ = train(replace(CASES[2], steps=2), folder / mesh[:4], team, mesh)
            optimizer = make_optimizer(spread.model, 0.02, settings(CASES[2]), spread)
            checkpoints = Checkpoints(folder / mesh[:4], optimizer, spread, 1)
            checkpoints.align_copies()
            quiet = len(said)
            piece = next(p for p in spread.pieces if p.local.numel())
            first = piece.local.detach().reshape(-1)[:1].clone()
            if team.rank == team.size - 1:
                piece.local.detach().reshape(-1)[:1] += 1e-9
            checkpoints.align_copies()
            found[mesh] = {"same": bool(piece.local.detach().reshape(-1)[:1] == first), "quiet": quiet}
    return found


LEARNED = Case("learned", "adamw", torch.float32, steps=6)


def learned_ranges(folder: Path, mesh: str) -> int:
    """Steps of a model whose ranges are learned, which have no gradient while λ is 0."""
    global model_of

    def model_of(case: Case) -> Any:
        model = build("llama", **SHAPES).train()
        ternarize(model, TernarySpec(scale="row", learned_ranges=True))
        return model

    with open_team(CPU, Signals(), print) as team:
        _, _, rows = train(LEARNED, folder / f"run-{mesh}", team, mesh)
    return len(rows)


def whole_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process reads from a checkpoint: parameters and the optimizer's state."""
    from trilobit.train.checkpoint import load_checkpoint, optimizer_tensors
    from trilobit.train.pieces import whole_pieces

    model = model_of(DROPPING)
    optimizer = make_optimizer(model, 0.02, settings(DROPPING))
    load_checkpoint(checkpoint, model, optimizer)
    return parameters(model), optimizer_tensors(whole_pieces(model), optimizer)
