"""Models that ranks share from the beginning to the end, without one of them ever having the whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families import build
from infer.checkpoints import byte_tokenizer, save
from train import parting
from train.ranks import launch
from trilobit.infer.load import load

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
ODD = {  # rows 37, 18, 6, 27 and 1 over 3 ranks: uneven parts, and empty ones
    "vocab_size": 259, "hidden_size": 18, "intermediate_size": 27, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
TUNED: dict[str, dict[str, Any]] = {
    "odd": {"model": ("llama", False, ODD), "precision": "bf16"},
    "gemma": {"model": ("gemma3_text", True, {"head_dim": 8}), "placement": "output"},
    "covered": {"model": ("llama", True, ODD), "placement": "output", "cover": "+embeddings"},
    "single-scale": {"model": ("llama", True, ODD), "gain": "scalar", "attention": "eager"},
    "ranges": {"model": ("qwen3", False, {"head_dim": 8}), "scale": "row", "learned_ranges": True, "placement": "none"},
    "never": {"model": ("llama", False, {}), "schedule": "never"},
    "stock": {"model": ("llama", False, {}), "gain_init": "ones", "model_format": "autobitlinear"},
}  # fmt: skip
PRETRAINED: dict[str, dict[str, Any]] = {
    "osp": {"architecture": ODD, "optimizer": "muon", "ssnorm": True, "embproj": True},
    "plain": {"architecture": ODD | {"tie_word_embeddings": True}, "ssnorm": False, "embproj": False},
}  # fmt: skip


def settings(place: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": str(place / "text.txt"), "cache_dir": str(place / "cache"), "sequence_length": 16, "sequences": 2,
        "batch_tokens": 96, "max_tokens": 192, "eval_tokens": 7 * 16, "device": "cpu", "precision": "fp32",
        "out": str(out), **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a checkpoint for every case of `tune`, a config.json for every one of `pretrain`."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "text.txt").write_text("Sphinx of black quartz, judge my vow. Pack my box with five dozen jugs. " * 80)
    for name, case in TUNED.items():
        family, tied, sizes = case["model"]
        model = build(family, tied=tied, **{"vocab_size": 259, "num_hidden_layers": 2, **sizes})
        if name == "single-scale":
            for path, parameter in model.named_parameters():
                if path.endswith("layernorm.weight"):
                    torch.nn.init.constant_(parameter, 0.7)
        save(folder / name, model)
    for name, case in PRETRAINED.items():
        byte_tokenizer().save_pretrained(folder / name)
        config = build("llama", **ODD).config.to_dict() | case["architecture"]
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def configurations(place: Path, out: Path, **more: Any) -> dict[str, list[dict[str, Any]]]:
    tuned = [settings(place, out / n, **(case | {"model": str(place / n)}), **more) for n, case in TUNED.items()]
    made = [
        settings(place, out / n, **(case | {"architecture": str(place / n)}), seed=3, **more) for n, case in PRETRAINED.items()
    ]
    return {"tuned": tuned, "pretrained": made}


@pytest.fixture(scope="module")
def runs(place: Path) -> tuple[Path, Path, list[list[str]]]:
    """The same runs, without their training, by one process and by three ranks; and what the first of these said."""
    parting.without_training(place, **configurations(place, place / "one"))
    answers = launch(
        parting.without_training, 3, place / "ranks", seconds=500, **configurations(place, place / "three", mesh="fsdp")
    )
    return place / "one", place / "three", answers[0]


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", TUNED)
def test_tune_in_parts_begins_and_ends_as_one_process(name: str, runs: tuple[Path, Path, list[list[str]]]) -> None:
    """Roles, gains, the original's loss, the teacher's, latents and model/ of three ranks, none of which had the model, are
    those of one process: bit for bit but for what forwards have measured, and that to rounding."""
    one, three = (record(place / name) for place in runs[:2])
    assert one["base"] == three["base"] and one["plan"] == three["plan"] and one["single_scale"] == three["single_scale"]
    assert len(one["single_scale"]) == (4 if name == "single-scale" else 0)
    assert three["base_nats_per_token"] == pytest.approx(one["base_nats_per_token"], rel=1e-6)
    assert one["gains"].keys() == three["gains"].keys() and bool(one["gains"]) == (name not in ("never", "ranges", "stock"))
    within = 1e-2 if name == "odd" else 1e-5  # computed in bf16
    for path, gain in one["gains"].items():
        assert three["gains"][path] == pytest.approx(gain, rel=within), path
    ours, theirs = (json.loads((place / name / "losses.json").read_text()) for place in runs[:2])
    assert ours.keys() == theirs.keys()
    assert theirs["total"] == pytest.approx(ours["total"], rel=2e-2 if name == "odd" else 1e-3)
    for kind in ("latent", "model"):
        ours, theirs = (tensors(place / name / kind) for place in runs[:2])
        assert ours.keys() == theirs.keys()
        for path, tensor in ours.items():
            assert tensor.dtype == theirs[path].dtype
            if path.endswith("rms_norm.weight"):
                assert torch.allclose(tensor, theirs[path], rtol=within, atol=0), path
            else:
                assert torch.equal(tensor, theirs[path]), path
    for field in ("form", "parameters", "ternary_parameters", "base_bytes", "model_bytes", "heldout_tokens"):
        assert one["result"][field] == three["result"][field], field
    assert three["result"]["nats_per_token"] == pytest.approx(one["result"]["nats_per_token"], rel=1e-3)
    assert (runs[0] / name / "model" / "config.json").read_text() == (runs[1] / name / "model" / "config.json").read_text()
    assert load(runs[1] / name).model.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrain_in_parts_draws_what_one_process_draws(name: str, runs: tuple[Path, Path, list[list[str]]]) -> None:
    """The random weights of three ranks, none of which had them all, have the fingerprint of those of one process with the
    same seed; and folded, tensor by tensor, they are the same model/."""
    one, three = (record(place / name) for place in runs[:2])
    assert one["base"] == three["base"]
    ours, theirs = (tensors(place / name / "model") for place in runs[:2])
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        assert torch.allclose(tensor, theirs[path], rtol=1e-6, atol=1e-8), path
    for field in ("parameters", "heldout_tokens"):
        assert one["result"][field] == three["result"][field], field
    for field in ("nats_per_token", "excess_kurtosis"):
        assert three["result"][field] == pytest.approx(one["result"][field], rel=1e-3), field


def test_what_is_said(runs: tuple[Path, Path, list[list[str]]]) -> None:
    """That model/ was compared on the CPU of one rank is said, and nothing of a model that had to be loaded whole."""
    for notes in runs[2]:
        assert any("mesh fsdp: one copy in 3 parts" in note for note in notes)
        assert any("read back and compared on the CPU of rank 0" in note for note in notes)
        assert not any("the whole model before it keeps its part" in note for note in notes)


def test_what_was_stopped_goes_on_in_parts(place: Path) -> None:
    """`tune` and `pretrain` in parts that a signal stopped after the second of four steps or in the third and that --resume
    continued end with the weights of runs that were never stopped, bit for bit, and logs without gaps."""
    more = {"mesh": "fsdp", "max_tokens": 4 * 96}

    def pair(kind: str, name: str) -> list[dict[str, Any]]:
        return [settings(place, place / f"{name}-{end}", **{kind: str(place / name)}, **more) for end in ("whole", "stopped")]

    answers = launch(
        parting.continued, 2, place / "pairs", seconds=500, tuned=pair("model", "odd"), pretrained=pair("architecture", "osp")
    )
    for name, kinds in {"odd": ("latent", "model"), "osp": ("model",)}.items():
        whole, stopped = place / f"{name}-whole", place / f"{name}-stopped"
        steps = [[json.loads(line)["step"] for line in (r / "log.jsonl").read_text().splitlines()] for r in (whole, stopped)]
        assert steps[0] == steps[1] == [1, 2, 3, 4]
        for kind in kinds:
            ours, theirs = tensors(whole / kind), tensors(stopped / kind)
            assert ours.keys() == theirs.keys() and ours
            assert all(torch.equal(tensor, theirs[path]) for path, tensor in ours.items())
    for notes, steps in answers[0]:
        assert steps in ([2, 3, 4], [3, 4])
        assert not any("the whole model before it keeps its part" in note for note in notes)


def test_what_cannot_be_read_in_parts_is_read_whole(place: Path) -> None:
    """A checkpoint in PyTorch's pickled form is loaded whole by every rank, which is said, and is the same run."""
    pickled = shutil.copytree(place / "odd", place / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    one, two = ([settings(place, place / f"pickled-{n}", model=str(pickled))] for n in (1, 2))
    parting.without_training(place, one, [])
    two[0]["mesh"] = "fsdp"
    answers = launch(parting.without_training, 2, place / "pickles", seconds=300, tuned=two, pretrained=[])
    assert any("the whole model before it keeps its part" in note for note in answers[0][0])
    ours, theirs = (tensors(place / f"pickled-{n}" / "latent") for n in (1, 2))
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        assert torch.allclose(tensor, theirs[path], rtol=1e-5, atol=0), path


def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    """Until four ranks train, none has more than its rows, twice, and some layers: less than the model; and rank 0 is given one
    parameter at a time to write; and none asks for a model that is loaded whole."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = build("llama", vocab_size=259, **sizes)
    size, largest = sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters())
    save(tmp_path / "model", model)
    del model
    (tmp_path / "text.txt").write_text("Sphinx of black quartz, judge my vow. Pack my box with five dozen jugs. " * 80)
    more = {"model": str(tmp_path / "model"), "distill": "none", "mesh": "fsdp", "batch_tokens": 64, "max_tokens": 64}
    tuned = settings(tmp_path, tmp_path / "run", **more, model_format="none", sequences=1)
    for answer in launch(parting.held, 4, tmp_path / "new", seconds=900, tuned=tuned):
        print({name: value / size for name, value in answer.items()})
        assert 0.25 * size < answer["start"] < 0.75 * size
        assert answer["given"] <= largest
