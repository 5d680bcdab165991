"""Benchmarks of fake-quantised models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infer.checkpoints import byte_model, byte_tokenizer, save
from measure import bench_files
from trilobit.config.eval import EvalConfig
from trilobit.config.quantize import QuantizeConfig
from trilobit.errors import ConfigError
from trilobit.fourbit.evaluate import Cell
from trilobit.fourbit.result import task_rows
from trilobit.measure.evaluate import run as evaluate
from trilobit.measure.scores import TaskScore
from trilobit.report.fourbit import run

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'trilobit[eval]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save(folder / "model", byte_model(num_hidden_layers=1, max_position_embeddings=640), byte_tokenizer())
    (folder / "text.txt").write_text("A text that is measured, and nothing else.\n" * 8)
    bench_files.write(folder / "bench", 6)
    return folder


def settings(place: Path, **more: Any) -> QuantizeConfig:
    common = {
        "models": (str(place / "model"),), "data": str(place / "text.txt"), "sequence_length": 16, "max_tokens": 64,
        "device": "cpu", "tasks": "piqa", "task_data": str(place / "bench"),
    }  # fmt: skip
    return QuantizeConfig(**{**common, **more})


def test_the_original_scores_as_eval_says(place: Path) -> None:
    """The original's average is that of `trilobit eval`; the cell is asked the same questions, at its bits."""
    original, cell = run(settings(place, bits="2-2-2")).cells
    expected = evaluate(
        EvalConfig(model=str(place / "model"), tasks="piqa", task_data=str(place / "bench"), sequences=4, device="cpu")
    )
    assert (original.average, original.average_stderr) == (expected.average, expected.average_stderr)
    assert original.tasks == expected.tasks
    assert cell.tasks is not None and original.tasks is not None
    assert [(t.task, t.metric, t.examples) for t in cell.tasks] == [(t.task, t.metric, t.examples) for t in original.tasks]


def test_written_answers_have_a_limit_of_their_own(place: Path) -> None:
    """--generate-limit cuts tasks whose answer is written freely, --limit the others, and both count in one average."""
    cell = run(settings(place, tasks="piqa,gsm8k", limit=4, generate_limit=2, shots=0)).cells[1]
    assert cell.tasks is not None
    assert {task.task: task.examples for task in cell.tasks} == {"piqa": 4, "gsm8k": 2}
    assert sum(task.averaged for task in cell.tasks) == 2 and cell.average is not None


def test_the_table_of_benchmarks() -> None:
    """A row for each cell that was asked, what counts alone, in percent with its error; nothing where nobody was asked."""
    common = {"model": "m", "protocol_sha256": "a", "model_sha256": "b", "measurement_sha256": "c", "version": "1"}

    def score(task: str, value: float, averaged: bool = True) -> TaskScore:
        return TaskScore(task, "acc", value, 0.035, 0.5, 200, 0, "1", averaged=averaged)

    asked = Cell(
        **common, column="RTN", bits="4-4-4", method="rtn", average=0.5, average_stderr=0.0151,
        tasks=[score("piqa", 0.47), score("piqa_norm", 0.9, averaged=False)],
    )  # fmt: skip
    silent = Cell(**common, column="QuaRot", bits="4-4-4", method="gptq")
    assert task_rows([silent]) == []
    assert task_rows([silent, asked]) == [
        ["bits", "made by", "piqa (200)", "average"], ["4-4-4", "RTN", "47.0 ± 3.5", "50.0 ± 1.5"],
    ]  # fmt: skip


def test_tasks_that_do_not_exist(place: Path) -> None:
    """The nearest is offered, before anything is loaded; without files and network the message says what is missing."""
    with pytest.raises(ConfigError, match=r"no files for piqqa; did you mean piqa\?"):
        run(settings(place, tasks="piqqa", models=("nowhere",)))
