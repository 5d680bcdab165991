import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from train import sharing
from train.ranks import launch
from train.sharing import CASES, Case
from trilobit.errors import ConfigError
from trilobit.train.checkpoint import shard_name
from trilobit.train.distributed import parts_of_step, require_even_parts
from trilobit.train.mesh import arrange
from trilobit.train.muon import Muon
from trilobit.train.pieces import heights

FP64, FP32 = 1e-10, 1e-3
"""Largest difference from one process: in fp64 of any parameter, relative to the way it has gone; in fp32 of all parameters
together. There another order of addition moves latents by last bits, and one that crosses a threshold changes a code."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process makes of every case; and, as NAME-start, what all begin with."""
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("alone")
        found[f"{case.name}-start"] = sharing.parameters(sharing.model_of(case))
        found[case.name] = sharing.parameters(sharing.train(case, folder)[1])
    return found


def together(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """‖found − expected‖ / ‖expected − start‖ over all parameters at once."""
    squares = [((found[n] - expected[n]).square().sum(), (expected[n] - start[n]).square().sum()) for n in expected]
    return (sum(a.item() for a, _ in squares) / sum(b.item() for _, b in squares)) ** 0.5


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest ‖found − expected‖ / ‖expected − start‖ of all parameters."""
    assert found.keys() == expected.keys()
    parts = [(found[n] - expected[n]).norm() / (expected[n] - start[n]).norm() for n in expected if expected[n].numel()]
    return torch.stack(parts).max().item()


@pytest.mark.parametrize("size", [2, 4])
def test_every_mesh_trains_as_one_process(size: int, alone: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """Up to twenty steps by DDP, FSDP2 and HSDP, with accumulation, λ rising, rows that do not divide: the parameters of one
    process to 1e-10 of the way they went in fp64, and to the stated bound in fp32."""
    launch(sharing.all_meshes, size, tmp_path)
    for mesh, gather, index in sharing.TRIED[size]:
        case = CASES[index]
        found = load_file(tmp_path / f"{mesh}-{gather}-{case.name}.safetensors")
        measure, bound = (farthest, FP64) if case.dtype == torch.float64 else (together, FP32)
        distance = measure(found, alone[case.name], alone[f"{case.name}-start"])
        print(mesh, gather, case.name, distance)
        assert distance <= bound, (mesh, gather, case.name)


def test_layers_may_be_compiled(tmp_path: Path) -> None:
    """With compiled layers two ranks' parts train as one process without them, by one graph for each state of λ that all layers
    share, which nothing that gathers rows breaks."""
    expected = sharing.parameters(sharing.train(replace(sharing.COMPILED, compiled=False), tmp_path / "alone")[1])
    graphs = launch(sharing.compiled_layers, 2, tmp_path)
    assert graphs == [{"graphs": 3}] * 2
    found = load_file(tmp_path / "found.safetensors")
    assert farthest(found, expected, sharing.parameters(sharing.model_of(sharing.COMPILED))) <= FP64


def test_heads_may_be_in_the_loss(tmp_path: Path) -> None:
    """Of rows that FSDP2 shares out, a distilled batch has the same losses and gradients with student's and teacher's heads
    applied block by block inside the loss."""
    assert max(launch(sharing.late_distillation, 2, tmp_path)) <= 1e-4


def test_a_checkpoint_that_fails_unforeseen(tmp_path: Path) -> None:
    """A thread that ends with an exception of any kind is heard of by all ranks, and leaves nothing half-written."""
    said = launch(sharing.writer_fails, 2, tmp_path)
    assert all("MemoryError: no room for a copy" in text for text in said), said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_copies_that_drift_are_brought_together(tmp_path: Path) -> None:
    """A last bit by which one copy differs is noticed at the next checkpoint: all go on with the first copy, and it is said."""
    answers = launch(sharing.drifting_copies, 4, tmp_path)
    for answer in answers:
        for mesh in ("ddp", "hsdp:2x2"):
            assert answer[mesh]["same"], mesh
    assert answers[0]["ddp"]["quiet"] == 0 and sum("drifted apart" in text for a in answers for text in a["said"]) == 2


@pytest.mark.parametrize("mesh", ["ddp", "fsdp"])
def test_learned_ranges_train_on_ranks(mesh: str, tmp_path: Path) -> None:
    """Parameters that have no gradient while nothing is quantised stop no mesh."""
    assert launch(sharing.learned_ranges, 2, tmp_path, mesh=mesh) == [6, 0]


def test_planted_faults_are_caught(alone: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """An iteration of a rank's rows alone, and a scale of them alone, are far outside of what the right ones keep."""
    launch(sharing.faults, 2, tmp_path)
    right, start = load_file(tmp_path / "none.safetensors"), alone["muon-start"]
    for fault in ("local-iteration", "shard-scale"):
        assert farthest(load_file(tmp_path / f"{fault}.safetensors"), right, start) > 0.05, fault


def test_the_samples_of_a_step_are_the_same_for_any_ranks() -> None:
    """The parts of a step's samples are equally many micro-batches on every rank, and together the step, each sample once."""
    for sequences in (1, 3, 8, 24):
        config = sharing.settings(CASES[0], batch_tokens=24 * sharing.LENGTH, sequences=sequences, max_tokens=10**6)
        for size in (1, 2, 3, 4, 6, 8, 12, 24):
            require_even_parts(config, size)
            parts = [parts_of_step(config, rank, size) for rank in range(size)]
            assert len({len(part) for part in parts}) == 1
            assert all(number <= sequences for part in parts for _, number in part)
            assert [s for part in parts for first, number in part for s in range(first, first + number)] == list(range(24))
    config = sharing.settings(CASES[0], batch_tokens=24 * sharing.LENGTH, sequences=1, max_tokens=10**6)
    with pytest.raises(ConfigError, match=r"24 sequences cannot be shared equally by 5 ranks: .*140 or 175"):
        require_even_parts(config, 5)


def test_what_a_refusal_advises_is_accepted() -> None:
    """Steps that ranks cannot share evenly are refused with --batch-tokens that they can, whatever the micro-batches."""
    refused = 0
    for size in range(2, 12):
        for sequences in range(1, 9):
            for samples in (1, 2, 3, 5, 8, 12, 13, 24, 31):
                config = sharing.settings(
                    CASES[0], batch_tokens=samples * sharing.LENGTH, sequences=sequences, max_tokens=10**6
                )
                try:
                    require_even_parts(config, size)
                except ConfigError as error:
                    refused += 1
                    advised = re.search(r"--batch-tokens ([\d or]+)\(", str(error))
                    assert advised is not None
                    for tokens in advised[1].split(" or "):
                        require_even_parts(replace(config, batch_tokens=int(tokens)), size)
    assert refused > 100


def test_rows_by_owners_are_whole_matrices(tmp_path: Path) -> None:
    """Three steps of NorMuon on rows equal those on whole matrices, by owners as by gathering, with uneven and empty parts and
    gradients that one rank or all lack; each matrix is iterated once by its owner, and by everyone where all is gathered."""
    for size in (2, 4):
        counts = launch(sharing.sharded_steps, size, tmp_path / str(size))
        whole = [torch.nn.Parameter(matrix) for matrix in sharing.matrices()]
        optimizer = Muon(
            [{"params": whole, "muon": True}], 0.1, (0.9, 0.95), weight_decay=0.1, normuon=True, compute=torch.float64
        )
        for step in range(3):
            for parameter, gradient in zip(whole, sharing.gradients(step, size), strict=True):
                parameter.grad = gradient
            optimizer.step()
        number = len(sharing.MATRICES) - 1
        assert sum(count["owned"] for count in counts) == number
        assert max(count["owned"] for count in counts) <= -(-number // size) + 1
        assert [count["gathered"] for count in counts] == [number] * size
        for how in ("owned", "gathered"):
            files = [load_file(tmp_path / str(size) / f"{how}-{rank}.safetensors") for rank in range(size)]
            for index, parameter in enumerate(whole):
                rows = [file[str(index)] for file in files]
                assert [len(part) for part in rows] == heights(len(parameter), size)
                assert torch.allclose(torch.cat(rows), parameter, rtol=0, atol=1e-10), (how, index)


def test_checkpoints_of_four_ranks(tmp_path: Path) -> None:
    """A signal to one of four ranks stops all after the same step; resumed by four, the run is bit for bit the one that was not
    stopped, dropout included; and the checkpoint gives two ranks and one process exactly the rows that four files hold."""
    answers = launch(sharing.interrupted, 4, tmp_path)
    for answer in answers:
        assert answer["same"] and answer["stopped"] == 15
    assert answers[0]["left"] == ["step-4", "step-5"] and (answers[0]["rows"], answers[0]["more"]) == (9, 4)
    step = tmp_path / "stopped" / "checkpoints" / "step-5"
    names = {"state.json", "manifest.json"} | {shard_name(k, r, 4) for k in ("model", "optimizer") for r in range(4)}
    assert {file.name for file in step.iterdir()} == names
    naive: dict[str, list[Tensor]] = {}
    for rank in range(4):
        for kind in ("model", "optimizer"):
            for name, rows in load_file(step / shard_name(kind, rank, 4)).items():
                naive.setdefault(name, []).append(rows)
    launch(sharing.loaded, 2, tmp_path / "two", checkpoint=str(step))
    read: list[dict[str, Any]] = [load_file(tmp_path / "two" / f"read-{rank}.safetensors") for rank in range(2)]
    model, optimizer = sharing.whole_state(step)
    for name, rows in naive.items():
        expected = torch.cat(rows) if rows[0].ndim else rows[0]
        two = torch.cat([part[name] for part in read if name in part]) if rows[0].ndim else read[0][name]
        assert torch.equal(two, expected), name
        assert torch.equal((model | optimizer)[name], expected), name


@pytest.mark.parametrize(("mesh", "size"), [("ddp", 2), ("hsdp:2x2", 4)])
def test_copies_resume_bit_for_bit(mesh: str, size: int, tmp_path: Path) -> None:
    """The same of ranks that hold copies."""
    for answer in launch(sharing.interrupted, size, tmp_path, mesh=mesh):
        assert answer["same"] and answer["stopped"] == 15


@pytest.mark.parametrize("mesh", ["fsdp", "ddp"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(mesh: str, tmp_path: Path) -> None:
    """All end with the error of the step, and what an earlier step had begun to save is there."""
    said = launch(sharing.not_finite, 2, tmp_path, mesh=mesh)
    assert all("step 3: the loss is not finite" in text for text in said), said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize("mesh", ["fsdp", "ddp"])
def test_weights_that_are_not_finite_on_one_rank_are_not_saved(mesh: str, tmp_path: Path) -> None:
    """All end; the rank whose weights they are names one, the other says where to look."""
    first, second = launch(sharing.weights_not_finite, 2, tmp_path, mesh=mesh)
    assert "after step 2 a weight on another rank is not finite" in first
    assert "after step 2 " in second and "embed_tokens.weight is not finite. The last update broke" in second
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == []


def test_a_dead_rank_is_noticed(tmp_path: Path) -> None:
    """A rank that is killed ends the others with an error that says so, and one that is stopped, whose connections stay open,
    ends them by its silence."""
    first, _ = launch(sharing.one_dies, 2, tmp_path / "killed", dead=(1,), how="SIGKILL")
    assert "lost touch with another rank" in first and "--max-restarts" in first
    codes = launch(sharing.one_dies, 2, tmp_path / "stopped", dead=(1,), ends=(0,), how="SIGSTOP")
    assert codes[0] == 75
    assert "rank 1 has given no sign of life" in (tmp_path / "stopped" / "said-0").read_text()


GB = 10**9


@pytest.mark.parametrize(
    ("wanted", "parameters", "size", "local", "memory", "kind", "replicas", "shards"),
    [
        ("auto", 10**9, 1, 1, 80 * GB, "one", 1, 1),
        ("auto", 10**9, 8, 8, 80 * GB, "ddp", 8, 1),
        ("auto", 8 * 10**9, 8, 8, 80 * GB, "fsdp", 1, 8),
        ("auto", 8 * 10**9, 32, 8, 80 * GB, "hsdp", 4, 8),
        ("auto", 70 * 10**9, 64, 8, 80 * GB, "fsdp", 1, 64),
        ("fsdp", 1, 4, 4, GB, "fsdp", 1, 4),
        ("hsdp:2x2", 1, 4, 4, GB, "hsdp", 2, 2),
    ],
)
def test_the_mesh_is_chosen_by_memory(
    wanted: str, parameters: int, size: int, local: int, memory: int, kind: str, replicas: int, shards: int
) -> None:
    """A copy each where it fits, a copy per machine where that does, else one copy; and as asked. The reason is said."""
    found = arrange(wanted, parameters, size, local, memory)
    assert (found.kind, found.replicas, found.shards) == (kind, replicas, shards)
    assert found.reason in str(found) and found.reason


def test_muons_work_is_shared_where_a_copy_would_fit() -> None:
    """Parts within a machine instead of copies, and why."""
    for size, kind in ((8, "fsdp"), (32, "hsdp")):
        found = arrange("auto", 10**9, size, 8, 80 * GB, optimizer="muon")
        assert (found.kind, found.shards, found.gathered_once) == (kind, 8, True)
        assert "the ranks of a machine share Muon's iteration" in str(found)
    assert arrange("ddp", 10**9, 8, 8, 80 * GB, optimizer="muon").kind == "ddp"


def test_rows_are_gathered_once_a_step_where_memory_is_plenty() -> None:
    """Once a step where all parameters in fp32 are an eighth of the memory at most, or as asked; it is said."""
    for parameters, gather, once in [(2 * 10**9, "auto", True), (3 * 10**9, "auto", False)]:
        found = arrange("fsdp", parameters, 4, 4, 80 * GB, gather)
        assert found.gathered_once == once == ("gathered once a step" in str(found))
    assert not arrange("fsdp", 2 * 10**9, 4, 4, 80 * GB, whole_bytes=6).gathered_once  # with a teacher in bf16
    assert (
        arrange("fsdp", 3 * 10**9, 4, 4, 80 * GB, "step").gathered_once
        and arrange("hsdp:2x2", 10**12, 4, 4, GB, "step").gathered_once
    )
    assert not arrange("fsdp", 1, 4, 4, GB, "layer").gathered_once and not arrange("ddp", 1, 4, 4, GB, "step").gathered_once


def test_a_step_gathers_as_often_as_arranged(tmp_path: Path) -> None:
    """Of two layers and what is outside them, in two micro-batches: each for its forward and, but for what is outside, which
    waits, its backward; or once. Gradients are exchanged once each either way, and nothing stays whole after the step."""
    layer, once = launch(sharing.collectives_of_a_step, 2, tmp_path)[0]
    assert layer == {"exchanges": 10 + 3, "whole": 0}
    assert once == {"exchanges": 3 + 3, "whole": 0}


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges_stand_in_for_gloos_collectives(size: int, tmp_path: Path) -> None:
    """Parts of any length, none among them."""
    assert all(launch(sharing.gloo_exchanges, size, tmp_path))


@pytest.mark.parametrize(
    ("wanted", "size", "message"),
    [("hsdp:2x4", 4, "is 8 ranks, but 4 were started"), ("fsdp", 1, "needs several processes: torchrun")],
)
def test_a_mesh_that_does_not_fit_is_refused(wanted: str, size: int, message: str) -> None:
    """--mesh that is not the number of ranks, or that wants several in one process, is a ConfigError."""
    with pytest.raises(ConfigError, match=message):
        arrange(wanted, 1, size, size, GB)


def test_fsdp1_and_nonsense_are_refused() -> None:
    """FSDP1 is refused with its reason; so is what is no mesh."""
    for text, message in {"fsdp1": "flattened parameters", "hsdp": "must be auto", "hsdp:2x1": "S ≥ 2"}.items():
        with pytest.raises(ConfigError, match=message):
            sharing.settings(Case("a", "adamw", torch.float64), mesh=text)
