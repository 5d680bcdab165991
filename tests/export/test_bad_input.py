"""What is wrong with the model, the disk or the target is one clear error, whatever is exported to, and leaves nothing."""

import errno
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.ggufs import SIZES, stored
from families import build
from infer.bitnets import write_bitnet
from infer.ggufs import write_gguf
from infer.test_gguf_file import HOSTILE
from trilobit.config.export import ExportConfig
from trilobit.errors import ModelError, OutputError, TrilobitError
from trilobit.export import convert, gguf, hf
from trilobit.export.check import Check
from trilobit.export.source import Source, StoredSource
from trilobit.infer.gguf_file import open_gguf
from trilobit.kernels import native
from trilobit.storage import atomic_directory, write_json
from trilobit.surgery.ternary import TernarySpec, set_strengths, ternarize

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # transformers' bitnet classes
FORMS = ["native", "hf", "gguf", "bf16"]
SMALL: dict[str, Any] = {"tie_word_embeddings": True, "num_hidden_layers": 1, "vocab_size": 4096, "hidden_size": 64,
                         "intermediate_size": 128}  # fmt: skip


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks have tests of their own; here none would be reached."""
    monkeypatch.setattr(convert, "verify", lambda *arguments: Check(why_not="a test"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A ternary model that every form can hold."""
    return stored(tmp_path / "model", settings=SMALL, placement="none")


def export(place: Path, out: Path, to: str) -> None:
    if to == "native" and not native.available():
        pytest.skip("no C++ compiler has built the kernels")
    convert.run(ExportConfig(model=str(place), out=str(out), to=to))  # pyright: ignore[reportArgumentType]


def require_refused(place: Path, to: str, says: str, kind: type[TrilobitError] = ModelError) -> None:
    """An error of one line, and nothing but the model where it is and where the target would be."""
    before = sorted(path.name for path in place.parent.iterdir())
    with pytest.raises(kind, match=says) as caught:
        export(place, place.parent / "out", to)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in place.parent.iterdir()) == before


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to make a file larger, as a full disk or a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", FORMS)
def test_no_room_for_the_weights(to: str, place: Path, tmp_path: Path) -> None:
    """The system stops a file in its header, in its middle, or one byte before its end: an OutputError, nothing left."""
    export(place, tmp_path / "whole", to)
    size = max(file.stat().st_size for file in (tmp_path / "whole").iterdir())
    for room in (100, size // 2, size - 1):
        with files_of_at_most(room):
            require_refused(place, to, "cannot write .*Nothing was left behind", OutputError)


@pytest.mark.parametrize("to", FORMS)
def test_no_room_for_any_of_the_files(to: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file in turn is the one that does not fit (ENOSPC when it is opened for writing)."""
    export(place, tmp_path / "whole", to)
    written = {file.name.replace("whole", "out") for file in (tmp_path / "whole").iterdir()}
    right, refused, full = open, set(), [""]

    def opening(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        name = Path(file).name.removeprefix(".").partition(".json.")
        if "w" in mode and (name[0] + ".json" if name[1] else Path(file).name) == full[0]:
            refused.add(full[0])
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(file, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", opening)
    monkeypatch.setattr("io.open", opening)
    for full[0] in sorted(written):
        if not full[0].startswith(("tokenizer", "special_tokens", "chat_template")):  # test_hf.py has the tokenizer's
            require_refused(place, to, "No space left on device.*Nothing was left behind", OutputError)
    assert len(refused) >= (3 if to == "gguf" else 4)
    assert refused >= {"manifest.json", "README.md"}


@pytest.mark.parametrize("to", FORMS)
def test_targets_that_cannot_be(to: str, place: Path, tmp_path: Path) -> None:
    """A target that is there, or whose parent is a file, is refused before the model is looked at, and stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    require_refused(place, to, r"out exists already\. Choose another --out", OutputError)
    (tmp_path / "file").write_text("mine")
    for missing in (place, tmp_path / "no model"):
        with pytest.raises(OutputError, match="file is not a writable folder"):
            export(missing, tmp_path / "file" / "out", to)
    assert (tmp_path / "out" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("to", FORMS)
def test_a_parent_without_permission(to: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that the system does not let us write is named."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    require_refused(place, to, f"{tmp_path.name} is not a writable folder", OutputError)


def _lacks(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
    (folder / "manifest.json").unlink()


def _reseal(folder: Path) -> None:
    """Give a directory a manifest for what it holds now: what follows is not found by its checksums."""
    kept = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}
    with atomic_directory(folder) as directory:
        for name, data in kept.items():
            (directory / name).write_bytes(data)


def _configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _without_tokenizer(folder: Path) -> None:
    _lacks(folder, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _another_models_weights(folder: Path) -> None:
    other = stored(folder.parent / "other", settings={**SMALL, "hidden_size": 128}, placement="none")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    for file in other.iterdir():
        file.unlink()
    other.rmdir()


def _half_the_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _index(content: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (_without_tokenizer, "the tokenizer of .*model"),
    "an activation that nobody has": (lambda f: _configure(f, hidden_act="unheard_of"), "unheard_of"),
    "another model's weights": (_another_models_weights, "the weights of .*model do not fit its config.json: .* is"),
    "another model's layers": (lambda f: _configure(f, num_hidden_layers=2), "model.* is missing"),
    "half of its weights": (_half_the_weights, "mlp.up_proj.weight is missing"),
    "weights that end too early": (_cut, "model.safetensors cannot be read"),
    "an index without a map": (_index({}), "index.json is damaged"),
    "an index that is none": (_index([1]), "index.json is damaged"),
    "an index of files that lie elsewhere": (
        _index({"weight_map": {"model.norm.weight": "../other.st"}}),
        "index.json is damaged",
    ),
    "an index of files that are not there": (
        _index({"weight_map": {"model.norm.weight": "other.st"}}),
        "other.st cannot be read",
    ),
}


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(damage: str, to: str, place: Path) -> None:
    """No tokenizer, an unknown activation, weights that are not its own: a ModelError that says what."""
    change, says = DAMAGES[damage]
    change(place)
    _reseal(place)
    require_refused(place, to, says)


@pytest.mark.parametrize("to", FORMS)
def test_what_its_manifest_does_not_list(to: str, place: Path) -> None:
    """A file that changed after it was written is named."""
    _configure(place, hidden_act="gelu")
    require_refused(place, to, "config.json is missing or damaged")


@pytest.mark.parametrize(("to", "says"), [("native", "no gelu gate"), ("gguf", "its gate is silu, this model's gelu")])
def test_gates_that_an_engine_does_not_have(to: str, says: str, tmp_path: Path) -> None:
    """An activation that transformers has and the engine has not is refused with its name."""
    place = stored(tmp_path / "model", settings={**SMALL, "hidden_act": "gelu"}, placement="none")
    require_refused(place, to, says, TrilobitError)


@pytest.mark.parametrize("to", FORMS)
def test_runs_that_have_not_finished(to: str, place: Path) -> None:
    """A run without a result, or with neither model/ nor latent/, is refused with what to do."""
    run = place.parent / "run"
    run.mkdir()
    write_json(run / "run.json", {"config": {}})
    place.rename(run / "latent")
    require_refused(run, to, "has not finished: continue it with --resume")
    write_json(run / "run.json", {"config": {}, "result": {}})
    (run / "latent").rename(run.parent / "elsewhere")
    require_refused(run, to, "holds neither model/ nor latent/")


@pytest.mark.parametrize("layers", [([1.0, 0.5], [1.0, 1.0]), ([1.0, 1.0], [0.0, 1.0])])
def test_models_that_are_still_fading_in(layers: tuple[list[float], list[float]], tmp_path: Path) -> None:
    """A model in memory whose weights or activations are not quantised all the way in one layer is no finished model."""
    model = build("llama", num_hidden_layers=2)
    plan = ternarize(model, TernarySpec(placement="none")).plan
    set_strengths(model, *layers)
    with pytest.raises(ModelError, match=r"model\.layers\.[01]\..*still fading in \(λ = 0(\.5)?\)"):
        hf.write_form(Source(model, plan, None), tmp_path, "packed", "fp32")


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("which", range(0, len(HOSTILE), 5))
def test_hostile_gguf_files(which: int, to: str, tmp_path: Path) -> None:
    """Headers whose lengths, dimensions or alignment lie are refused by every export, as they are by load()."""
    data, says = HOSTILE[which]
    (tmp_path / "m.gguf").write_bytes(data)
    require_refused(tmp_path / "m.gguf", to, says)


def test_damaged_gguf_content(tmp_path: Path) -> None:
    """Numbers that are not finite, and a fourth level, are found when their turn comes, and nothing is left."""
    file = write_gguf(tmp_path / "m.gguf", "llama", "tq2_0").path
    whole = file.read_bytes()
    places = open_gguf(file).tensors
    for name, offset, value, says in (
        ("output_norm.weight", 0, b"\x00\x00\xc0\x7f", "not finite"),
        ("blk.0.ffn_up.weight", 0, b"\xff", "a fourth level"),
        ("blk.1.ffn_up.weight", 64, b"\x00\x7e", "a scale of .* is not finite"),
    ):
        at = places[name].begin + offset
        file.write_bytes(whole[:at] + value + whole[at + len(value) :])
        require_refused(file, "gguf", says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(255), "a code that is none of −1, 0, 1"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill_(0), "no positive number"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "up_proj.weight_scale is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \(3,\), not \(32,\)"),
    ],
)
def test_damaged_bitnet_directories(change: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path) -> None:
    """Codes and scales of others that cannot be such, and tensors that are not there or of another shape, are named."""
    place = write_bitnet(tmp_path / "model", "bitlinear")
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    require_refused(place, "hf", says)


def test_the_refusal_of_a_width_names_what_holds_it(tmp_path: Path) -> None:
    """What no ternary type holds is written as f16 by default, and refused with that alternative where a type was asked for."""
    source = StoredSource(stored(tmp_path / "model", settings={**SIZES, "hidden_size": 96}, placement="none"))
    assert gguf.plan_file(source, "auto", "auto").kind == "f16"
    for kind in ("tq1_0", "tq2_0", "q2_0"):
        with pytest.raises(TrilobitError, match=f"--type {kind} cannot hold .*has 96, not a multiple. Use --type f16"):
            gguf.plan_file(source, kind, "auto")
