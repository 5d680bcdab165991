"""Benchmarks: what is asked, that the scores are lm-eval's own, and what is refused."""

import gzip
import importlib.util
import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch

from infer.checkpoints import byte_model, byte_tokenizer, save
from measure import bench_files
from trilobit.cli import main
from trilobit.config.eval import EvalConfig
from trilobit.errors import ConfigError, DataError, ModelError, TrilobitError
from trilobit.export.hf import write_model
from trilobit.infer.load import load, load_pretrained
from trilobit.listener import Listener
from trilobit.measure.evaluate import EvalResult, run
from trilobit.measure.scores import TaskScore, averages, compared, retention
from trilobit.measure.tasks import FIVE, OFFLINE, OSP10, OURS, Wanted, opened, wanted, write_definitions
from trilobit.surgery.ternary import TernarySpec, ternarize

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'trilobit[eval]'")

import lm_eval.tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions of each benchmark, in a folder whose name must be escaped in globs and in YAML."""
    return bench_files.write(tmp_path_factory.mktemp("bench") / 'a "b" [c]')


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("checkpoint"), byte_model(max_position_embeddings=640), byte_tokenizer())


def settings(model: Path, bench: Path, tasks: str, **others: Any) -> EvalConfig:
    return EvalConfig(model=str(model), tasks=tasks, task_data=str(bench), device="cpu", **others)


def test_suites() -> None:
    """five and osp10 are the published lists: eleven tasks of ten benchmarks, GSM8K with 8 examples, TriviaQA with 5."""
    assert [want.name for want in wanted("five")] == list(FIVE)
    osp = wanted("osp10")
    assert [want.name for want in osp] == list(OSP10)
    assert len(OSP10) == 11 and len({want.benchmark for want in osp}) == 10
    assert {want.name: want.shots for want in osp if want.shots} == {"gsm8k": 8, "triviaqa": 5}
    assert wanted(" piqa,lambada_openai ") == [Wanted("piqa", None, "piqa"), Wanted("lambada_openai", None, "lambada_openai")]
    assert all(want.shots == 2 for want in wanted("five,gsm8k", shots=2))


def instances(name: str, bench: Path, shots: int | None = None) -> list[tuple[str, str]]:
    with opened([Wanted(name, shots, name)], str(bench)) as tasks:
        (task,) = tasks.leaves.values()
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=2)
        return [instance.args for instance in task.instances if instance.doc_id == 1]


ASKED = {  # the prompt of the second question, and its answers where there are choices
    "piqa": ("Question: Open jar 1\nAnswer:", [" twist", " drop it"]),
    "arc_easy": ("Question: What is 1?\nAnswer:", [" one", " two", " a few", " many"]),
    "arc_challenge": ("Question: What is 1?\nAnswer:", [" one", " two", " a few", " many"]),
    "hellaswag": ("Baking: Cook 1 waits. She", [" eats.", " sleeps on.", " leaves the room.", " sings."]),
    "winogrande": (["Ann thanked Bea 1 times because Ann", "Ann thanked Bea 1 times because Bea"], [" had helped."] * 2),
    "winogrande_cloze": ("Ann thanked Bea 1 times because ", ["Ann had helped.", "Bea had helped."]),
    "commonsense_qa": (
        "Question: Where is 1?\nA. thing 1a\nB. thing 1b\nC. thing 1c\nD. thing 1d\nE. thing 1e\nAnswer:",
        [" A", " B", " C", " D", " E"],
    ),
    "commonsense_qa_cloze": ("Where is 1?", [f" thing 1{letter}" for letter in "abcde"]),
    "openbookqa": ("Number 1 is", [f" thing 1{letter}" for letter in "abcd"]),
    "social_iqa": ("Q: Kim ate 1 figs. Why?\nA:", [" hunger", " a dare", " no reason"]),
    "social_iqa_cloze": ("Kim ate 1 figs. Why?", [" hunger", " a dare", " no reason"]),
    "mmlu_cloze": (
        "The following are questions about virology.\nQuestion: What is 1?\nAnswer:", [" red", " green", " blue", " none"]
    ),
    "gsm8k": ("Question: What is 1 + 1?\nAnswer:", None),
    "triviaqa": ("Question: Who was 1?\nAnswer:", None),
    "lambada_openai": ("He said 1 and then he said", [" nothing"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFLINE)
def test_what_is_asked(name: str, bench: Path) -> None:
    """Each shipped YAML reads its file and asks, word for word, what lm-eval or the paper's authors ask."""
    prompts, answers = ASKED[name]
    asked = instances(name, bench, shots=0)
    assert [prompt for prompt, _ in asked] == (prompts if isinstance(prompts, list) else [prompts] * len(asked))
    assert answers is None or [answer for _, answer in asked] == answers


@pytest.mark.parametrize("name", sorted(set(OFFLINE) - {"mmlu_cloze"}))
def test_examples_are_other_questions(name: str, bench: Path) -> None:
    """With as many examples as there are other questions, each but the question itself is in the prompt, once."""
    first = instances(name, bench, shots=11)[0][0]
    none = instances(name, bench, shots=0)[0][0]
    assert first.endswith(none)
    shown = first.removesuffix(none).split("\n\n")[:-1]
    assert len(set(shown)) == len(shown) == 11
    assert not any(example.startswith(none) for example in shown)


LOCAL = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "fewshot_split"}
OTHER_LAYOUT = {"doc_to_text", "doc_to_choice", "doc_to_target", "doc_to_decontamination_query"}


@pytest.mark.parametrize("name", sorted(set(OFFLINE) - set(OURS)))
def test_definitions_are_lm_evals(name: str, tmp_path: Path) -> None:
    """An offline task differs from lm-eval's in where the data lies, and for ARC and LAMBADA in the names of fields."""
    ours = load_yaml(write_definitions(tmp_path, tmp_path)[name], resolve_func=False)
    (include,) = (line for line in OFFLINE[name].read_text().splitlines() if line.startswith("include"))
    theirs = load_yaml(LM_EVAL_TASKS / include.split("${lm_eval}/")[1].split('"')[0], resolve_func=False)
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    splits = {"validation_split", "test_split"}  # of those that have no file
    assert all(ours[key] is None for key in different & splits)
    other_layout = OTHER_LAYOUT if name in ("arc_easy", "arc_challenge", "lambada_openai") else set()
    assert different <= LOCAL | splits | other_layout
    assert ours["task"] == name


def lm_evals_own(folder: Path, bench: Path, tmp_path: Path, names: list[str], dtype: str, **others: Any) -> dict[str, Any]:
    """Scores and closed-form errors of lm-eval's `hf` backend, which loads the directory by itself."""
    definitions = write_definitions(tmp_path, bench)
    loaded = lm_eval.tasks.TaskManager(include_defaults=False).load([str(definitions[name]) for name in names])
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(1234)
    model = HFLM(pretrained=str(folder), dtype=dtype, batch_size=8, device="cpu")
    found = lm_eval.evaluate(model, loaded, log_samples=False, bootstrap_iters=0, **others)
    assert found is not None
    values = [(name, key, value) for name, row in found["results"].items() for key, value in row.items()]
    return {(n, k.removesuffix(",none")): v for n, k, v in values if "," in k and "_stderr" not in k}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_scores_are_lm_evals_own(tmp_path: Path, bench: Path, dtype: str, adds_bos: bool) -> None:
    """To the last digit, for choices, free answers with examples, and last words, however texts begin."""
    folder = save(tmp_path / "model", byte_model(max_position_embeddings=640), byte_tokenizer(adds_bos=adds_bos))
    names = ["hellaswag", "piqa", "arc_challenge", "winogrande", "mmlu_cloze", "lambada_openai"]
    names += ["triviaqa", "gsm8k"] if dtype == "fp32" and adds_bos else []
    result = run(settings(folder, bench, ",".join(names), limit=8, precision=dtype))
    assert result.tasks is not None
    ours = {(row.task, row.metric): row.score for row in result.tasks}
    long = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert ours == lm_evals_own(folder, bench, tmp_path, names, long, limit=8)
    assert (result.dtype, result.batch, result.limit) == (long, 8, 8)
    assert result.backend is not None and result.backend.startswith("lm-eval 0.")
    assert {row.task: row.shots for row in result.tasks}.get("gsm8k", 5) == 5
    assert {row.version for row in result.tasks if row.task == "piqa"} == {"1.0"}


@pytest.mark.parametrize("form", ["full precision", "ternary", "ternary embeddings"])
def test_scores_equal_a_naive_loop(checkpoint: Path, tmp_path: Path, bench: Path, form: str) -> None:
    """acc and acc_norm are those of one forward pass per choice, for every form of model (a tied packed embedding has no
    weight for lm-eval to tie: with HFLM as it is, an AttributeError)."""
    folder = checkpoint
    if form != "full precision":
        loaded = load_pretrained(
            str(save(tmp_path / "tied", byte_model(tie_word_embeddings=True, max_position_embeddings=640)))
        )
        surgery = ternarize(loaded.model, TernarySpec(cover="+embeddings" if form.endswith("embeddings") else "projections"))
        folder = tmp_path / "model"
        write_model(loaded.model, surgery.plan, loaded.tokenizer, folder, torch.randint(3, 200, (4, 17)))
    result = run(settings(folder, bench, "openbookqa", sequences=3))
    model, tokenizer = (loaded := load(folder)).model, loaded.tokenizer
    right = {"acc": 0, "acc_norm": 0}
    for index in range(12):
        row = bench_files.rows(index)["openbookqa_validation"]
        choices, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        logs = []
        for choice in choices:
            prompt = tokenizer(row["question_stem"])["input_ids"]
            ids = torch.tensor(tokenizer(f"{row['question_stem']} {choice}")["input_ids"])
            with torch.no_grad():
                log = model(input_ids=ids[None]).logits[0].double().log_softmax(dim=-1)
            logs.append(sum(log[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        right["acc"] += max(range(4), key=logs.__getitem__) == gold
        right["acc_norm"] += max(range(4), key=lambda i: logs[i] / len(choices[i])) == gold
    assert result.tasks is not None
    assert {row.metric: row.score for row in result.tasks} == {name: count / 12 for name, count in right.items()}
    for row in result.tasks:
        assert row.stderr == pytest.approx(math.sqrt(row.score * (1 - row.score) / 11))


def test_chance_and_long_prompts(tmp_path: Path, bench: Path) -> None:
    """Chance is the mean of 1/choices over what was asked; cut prompts are counted and scored as lm-eval does."""
    folder = save(tmp_path / "short", byte_model(max_position_embeddings=30))
    result = run(settings(folder, bench, "arc_challenge,lambada_openai,winogrande", limit=5))
    assert result.tasks is not None
    by_task = {row.task: row.chance for row in result.tasks if row.metric == "acc"}
    assert by_task == {"arc_challenge": pytest.approx((3 / 3 + 2 / 4) / 5), "lambada_openai": 0.0, "winogrande": 0.5}
    (perplexity,) = (row for row in result.tasks if row.metric == "perplexity")
    assert perplexity.chance is None and not perplexity.averaged and perplexity.stderr is not None
    own = lm_evals_own(folder, bench, tmp_path, ["arc_challenge", "lambada_openai", "winogrande"], "float32", limit=5)
    assert {(row.task, row.metric): row.score for row in result.tasks} == own
    lengths = [len(f"{p}{a}") for n in ("arc_challenge", "winogrande") for p, a in instances(n, bench, shots=0)]
    assert any(length > 31 for length in lengths) and result.truncated_prompts is not None and result.truncated_prompts > 0
    whole = run(settings(save(tmp_path / "long", byte_model(max_position_embeddings=640)), bench, "winogrande", limit=5))
    assert whole.truncated_prompts == 0


def score(task: str, value: float, metric: str = "acc", chance: float | None = 0.25, stderr: float | None = 0.01) -> TaskScore:
    return TaskScore(task, metric, value, stderr, chance, 100, 0, "1")


def test_retention_and_averages() -> None:
    """The part of the original's score above chance, nothing where that is noise; two tasks of a benchmark count once."""
    assert retention(0.55, 0.25, 0.65, 0.01) == pytest.approx(0.75)
    assert retention(0.55, 0.25, 0.65, 0.2) is None
    assert retention(0.55, 0.25, 0.25, None) is None
    assert retention(0.55, None, 0.65, 0.01) is None
    rows = [score("a", 0.3), score("a", 0.5, "acc_norm"), score("b", 0.7), score("c", 0.6, "exact_match,strict", 0.0)]
    rows += [score("d", 9.0, "perplexity", None), score("leaf", 0.1)]
    originals = [score(row.task, row.score + 0.1, row.metric, row.chance) for row in rows]
    counted = {"a": "ab", "b": "ab", "c": "c", "d": "d"}
    found = compared(rows, originals, counted)
    assert [(row.task, row.metric) for row in found if row.averaged] == [
        ("a", "acc_norm"), ("b", "acc"), ("c", "exact_match,strict"),
    ]  # fmt: skip
    assert found[1].above_chance == pytest.approx((0.5 - 0.25) / 0.75)
    assert found[1].retention == pytest.approx(0.25 / 0.35)
    means = averages(found, counted)
    assert means.average == pytest.approx((0.6 + 0.6) / 2)
    assert means.original_average == pytest.approx(0.7)
    assert means.average_above_chance == pytest.approx((0.6 - 0.125) / 0.875)
    assert means.retention == pytest.approx((0.6 - 0.125) / (0.7 - 0.125))
    assert means.average_stderr == pytest.approx(math.sqrt(0.01**2 / 2 + 0.01**2) / 2)
    assert averages([], {}).average is None


def test_json_holds_everything(checkpoint: Path, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and benchmarks in one command: --json prints one object, which is the result, and the terminal a table."""
    (tmp_path / "text.txt").write_text("some text, and more of it.\n" * 9)
    words = ["eval", str(checkpoint), "--task-data", str(bench), "--tasks", "arc_easy,arc_challenge,lambada_openai"]
    words += ["--data", str(tmp_path / "text.txt"), "--sequence-length", "16", "--original", str(checkpoint)]
    words += ["--device", "cpu", "--limit", "4"]
    assert main([*words, "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    result = EvalResult(**found | {"tasks": [TaskScore(**row) for row in found["tasks"]]})
    assert asdict(result) == found
    assert "it/s" not in streams.err
    assert result.perplexity is not None and result.tokens == 15 * 15
    assert result.examples_per_second is not None and result.examples_per_second > 0
    assert all(row.original_score == row.score for row in result.tasks or [])
    assert (
        result.average
        == result.original_average
        == pytest.approx(sum(row.score for row in result.tasks or [] if row.averaged) / 3)
    )
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("above chance", "arc_challenge", "acc_norm *", "perplexity", "original average"))


def test_the_listener_hears_how_far_it_is(checkpoint: Path, bench: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each stage reports up to its total; where examples come from is said; nothing is drawn or printed by lm-eval."""
    notes: list[str] = []
    stages: dict[str, tuple[int, int]] = {}

    class Ear(Listener):
        def note(self, text: str) -> None:
            notes.append(text)

        def progress(self, what: str, done: int, total: int, seconds: float) -> None:
            assert seconds >= 0
            stages[what] = (done, total)

    run(settings(checkpoint, bench, "piqa,lambada_openai", limit=3, shots=2), Ear())
    assert stages["Running loglikelihood requests"] == (9, 9)
    assert stages["Building prompts"] == (3, 3)
    assert notes == [
        "piqa: the 2 examples of a prompt are other questions of piqa_validation.jsonl.gz.",
        "lambada_openai: the 2 examples of a prompt are other questions of lambada_openai_test.jsonl.gz.",
    ]
    assert capfd.readouterr() == ("", "")


def test_task_data_stays_off_the_network(
    checkpoint: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reports each data set it loads; not with --task-data. Flags are put back, and no file stays."""
    asked: list[Any] = []
    monkeypatch.setattr("datasets.load.get_session", lambda *a, **k: asked.append(a))
    for module, name in [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]:
        monkeypatch.setattr(module, name, False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    run(settings(checkpoint, bench, "five", limit=1))
    assert not asked
    assert datasets.config.HF_HUB_OFFLINE is False
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "HF_DATASETS_OFFLINE" not in os.environ
    assert not list((tmp_path / "temporary").iterdir())
    (tmp_path / "a.json").write_text('{"a": 1}\n')
    datasets.load_dataset("json", data_files=str(tmp_path / "a.json"), cache_dir=str(tmp_path / "cache"))
    assert asked  # the test can fail


@pytest.mark.parametrize(
    ("others", "error", "says"),
    [
        ({"tasks": "helaswag"}, ConfigError, "--task-data has no files for helaswag; did you mean hellaswag.* covers arc_ch"),
        ({"tasks": "fife"}, ConfigError, "did you mean five"),
        ({"tasks": " , "}, ConfigError, "--tasks is empty"),
        ({"tasks": "five,piqa"}, ConfigError, "asks for piqa twice"),
        ({"tasks": "mmlu_cloze", "shots": 5}, ConfigError, "--shots 5: mmlu_cloze has no examples"),
        ({"tasks": "piqa", "shots": 12}, DataError, "piqa has 11 examples for its prompts, fewer than 12"),
        ({"tasks": "piqa", "task_data": "/no/where"}, DataError, "--task-data /no/where is not a directory"),
        ({"tasks": "gsm8k", "model": "short"}, ModelError, "gsm8k lets a model write 256 tokens; this one has 8 positions"),
        ({"tasks": "hellaswag", "model": "short"}, ModelError, "an answer has 17 tokens; the model has 8 positions"),
        ({"tasks": "piqa", "model": "/no/model"}, ModelError, "there is no /no/model"),
    ],
)  # fmt: skip
def test_what_cannot_work(
    checkpoint: Path, bench: Path, tmp_path: Path, others: dict[str, Any], error: type[TrilobitError], says: str
) -> None:
    """Each wrong request is an error that names the flag, the task or the number, and what there is instead."""
    others = dict(others)
    if others.get("model") == "short":
        others["model"] = str(save(tmp_path / "short", byte_model(max_position_embeddings=8)))
    with pytest.raises(error, match=says):
        run(EvalConfig(**{"model": str(checkpoint), "task_data": str(bench), "device": "cpu", **others}))


ROW = b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 1}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no piqa_validation.jsonl.gz, which piqa reads. A JSON object a line: goal, sol1, sol2, label"),
        (b"", "piqa_validation.jsonl.gz is empty. It should hold a JSON object a line: goal"),
        (b"no gzip", "piqa_validation.jsonl.gz is damaged near line 0: .*Not a gzipped file"),
        (gzip.compress(ROW)[:-9], "is damaged near line [01]: Compressed file ended"),
        (gzip.compress(b"{"), "piqa_validation.jsonl.gz is damaged near line 1: Expecting property name"),
        (gzip.compress(b"[]"), "line 1: no goal, sol1, sol2, label"),
        (gzip.compress(ROW + b'{"goal": "a", "sol1": "b", "sol2": null, "label": 1}\n'), "line 2: no sol2. A line should hold"),
        (gzip.compress(ROW + ROW.replace(b"1}", b'{"x": 1}}')), "line 2: not the same kinds of values as before"),
    ],
    ids=["missing", "empty", "no gzip", "truncated", "no JSON", "no object", "no field", "wrong kind"],
)
def test_broken_files(checkpoint: Path, tmp_path: Path, content: bytes | None, says: str) -> None:
    """A missing or damaged file, or one without the fields, is a DataError that names it and what it should hold."""
    if content is not None:
        (tmp_path / "piqa_validation.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        run(settings(checkpoint, tmp_path, "piqa"))
    assert "\n" not in str(caught.value)


def test_names_on_the_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --task-data an unknown name gets lm-eval's nearest; data that cannot be had points to --task-data."""
    manager = lm_eval.tasks.TaskManager

    def small(**_: Any) -> Any:  # indexing all of lm-eval's tasks takes ten seconds
        return manager(include_defaults=False, include_path=LM_EVAL_TASKS / "hellaswag")

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    for tasks, error, says in [
        ("helaswag", ConfigError, "lm-eval has no task 'helaswag'; did you mean hellaswag?"),
        ("hellaswag", DataError, "the hub's data set of hellaswag could not be read"),
        ("mmlu_cloze", DataError, "the hub's data set of mmlu_cloze could not be read"),
    ]:
        with pytest.raises(error, match=says):
            run(EvalConfig(model=str(checkpoint), tasks=tasks, device="cpu"))


def test_groups_and_tags(checkpoint: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group, its tasks are reported and the group counts, with the chance they share; of a tag, its tasks count."""
    write_definitions(tmp_path, bench)
    group = "{group: both, task: [openbookqa, arc_easy], aggregate_metric_list: [{metric: acc, weight_by_size: true}]}"
    (tmp_path / "offline" / "both.yaml").write_text(group)
    (tmp_path / "offline" / "twice.yaml").write_text(group.replace("both", "twice"))
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **_: manager(include_defaults=False, include_path=tmp_path / "offline")
    )
    result = run(EvalConfig(model=str(checkpoint), tasks="both,piqa", device="cpu", limit=6, shots=1))
    rows = {(row.task, row.metric): row for row in result.tasks or []}
    whole, parts = rows["both", "acc"], [rows[name, "acc"] for name in ("openbookqa", "arc_easy")]
    assert whole.score == pytest.approx(sum(part.score for part in parts) / 2)
    assert (whole.examples, whole.chance, whole.shots) == (12, 0.25, 1)
    assert [row.task for row in rows.values() if row.averaged] == ["both", "piqa"]
    assert result.average == pytest.approx((whole.score + rows["piqa", "acc_norm"].score) / 2)
    tagged = run(EvalConfig(model=str(checkpoint), tasks="ai2_arc", device="cpu", limit=2))
    assert {row.task for row in tagged.tasks or [] if row.averaged} == {"arc_easy", "arc_challenge"}
    with pytest.raises(ConfigError, match="asks for openbookqa twice, the second time by twice"):
        run(EvalConfig(model=str(checkpoint), tasks="both,twice", device="cpu"))


def test_without_lm_eval(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing package is named with the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--tasks needs lm-eval: pip install 'trilobit\[eval\]'"):
        run(EvalConfig(model=str(checkpoint), tasks="five"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "nothing to measure: give --data .* --tasks"),
        ({"tasks": "five", "limit": 0}, "--limit is 0"),
        ({"tasks": "five", "shots": -1}, "--shots is -1"),
        *[({"data": "d", name: value}, f"--{name.replace('_', '-')} is for benchmarks: it needs --tasks") for name, value in (
            ("task_data", "b"), ("shots", 1), ("limit", 1), ("original", "m"),
        )],
    ],
)  # fmt: skip
def test_settings_are_checked(config: dict[str, Any], says: str) -> None:
    """A combination that measures nothing, or says nothing, names its flag."""
    with pytest.raises(ConfigError, match=says):
        EvalConfig(model="m", **config)


SIZES = {
    "arc_challenge": 1172, "arc_easy": 2376, "commonsense_qa_cloze": 1221, "gsm8k": 1319, "hellaswag": 10042,
    "lambada_openai": 5153, "mmlu_cloze": 14042, "openbookqa": 500, "piqa": 1838, "social_iqa_cloze": 1954,
    "triviaqa": 7993, "winogrande_cloze": 1267,
}  # fmt: skip


def test_the_real_benchmarks(stories260k: Path) -> None:
    """The published files have the published sizes, and the real stories260K answers them."""
    bench = stories260k.parents[1] / "bench"
    if not bench.exists():
        pytest.skip(f"{bench} is not there")
    with opened(wanted(",".join(SIZES)), str(bench)) as tasks:
        assert {name: len(task.eval_docs) for name, task in tasks.leaves.items()} == SIZES
    result = run(settings(stories260k, bench, "piqa,winogrande_cloze", limit=4))
    assert result.average is not None and 0 <= result.average <= 1
