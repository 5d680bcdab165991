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
from trilobit.measure.evaluate import run as evaluate
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


def test_tasks_that_do_not_exist(place: Path) -> None:
    """The nearest is offered, before anything is loaded; without files and network the message says what is missing."""
    with pytest.raises(ConfigError, match=r"no files for piqqa; did you mean piqa\?"):
        run(settings(place, tasks="piqqa", models=("nowhere",)))
