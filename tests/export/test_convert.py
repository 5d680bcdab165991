"""`trilobit export` as a whole: what is written, card and check, and nothing left of what is refused or read wrongly."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from export.checks import check_here
from export.ggufs import stored, windows
from trilobit.config.export import ExportConfig
from trilobit.errors import ConfigError, DataError, ExportError, OutputError, VerificationError
from trilobit.export import convert, hf, llama_cpp, push, verification
from trilobit.export.card import EMBEDDED, licence_of, named, write_card
from trilobit.export.check import Check
from trilobit.export.verify import load_stock
from trilobit.formats import Bitnet
from trilobit.infer.gguf_file import open_gguf
from trilobit.infer.load import load
from trilobit.kernels import native
from trilobit.listener import Listener
from trilobit.storage import read_json, verify_manifest, write_json
from trilobit.tensors import stream_tensors

pytestmark = pytest.mark.filterwarnings(  # torch's own imports, on the way to transformers' bitnet classes
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
DENSE = "an ordinary checkpoint of code · scale in bf16"
SMALL: dict[str, Any] = {"tie_word_embeddings": True, "num_hidden_layers": 1}


def exported(folder: Path, to: str, settings: dict[str, Any] | None = None, **spec: Any) -> convert.ExportResult:
    stored(folder / "run" / "latent", settings=SMALL, **spec)
    write_json(
        folder / "run" / "run.json", {"config": {"model": "someone/base", "placement": "output"}, "result": {"tokens": 7}}
    )
    config: dict[str, Any] = {"model": str(folder / "run"), "out": str(folder / "out"), "to": to} | (settings or {})
    return convert.run(ExportConfig(**config))


@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_gguf(tmp_path: Path) -> None:
    """A whole directory: the file, and a card with base model, command, and the table of a check by llama.cpp."""
    result = exported(tmp_path, "gguf", {"type": "f32", "head": "f16"}, placement="output")
    verify_manifest(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "manifest.json", "out.gguf"}
    assert result.form == "graph bitnet, type f32"
    assert [row.reader for row in result.check.rows] == ["llama.cpp", "the model, int8 activations"]
    assert result.check.rows[0].agreement.positions == 8 * 127
    assert result.bytes == (tmp_path / "out" / "out.gguf").stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/base" in card
    assert "library_name: gguf" in card
    assert "llama-cli -m out.gguf" in card
    assert all(line in card for line in result.check.table())


@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_gguf_of_a_run_without_quantised_activations(tmp_path: Path) -> None:
    """Its model/ is an ordinary checkpoint, and what is written comes from latent/: the check reads that as well (old code: the
    other, whose int8 activations cost nothing, and every such run was refused)."""
    spec = {"placement": "none", "activations": "none", "scale": "group-64"}
    stored(tmp_path / "run" / "latent", settings={"num_hidden_layers": 1}, **spec)
    loaded = load(tmp_path / "run" / "latent")
    hf.write_model(loaded.model, loaded.plan, loaded.tokenizer, tmp_path / "run" / "model", windows(2))
    write_json(tmp_path / "run" / "run.json", {"config": {"model": "someone/base"}, "result": {}})
    assert read_json(tmp_path / "run" / "model" / "trilobit.json")["form"] == "dense"
    result = convert.run(ExportConfig(model=str(tmp_path / "run"), out=str(tmp_path / "it.gguf"), to="gguf"))
    assert result.check.rows[1].agreement.kl > 1e-4


def test_a_text_too_short_to_compare_on(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words " * 40)
    with pytest.raises(DataError, match=r"short\.txt is too short to compare models on: it has \d windows of 128 tokens"):
        exported(tmp_path, "bf16", {"data": str(tmp_path / "short.txt")}, placement="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_gguf_as_one_file(tmp_path: Path) -> None:
    """--out that ends in .gguf is that file, its card beside it (it was a directory with NAME.gguf.gguf inside); neither is
    written over, and neither is left of an export that fails."""
    file = tmp_path / "there" / "it.gguf"
    settings = {"type": "f32", "head": "f16", "out": str(file)}
    result = exported(tmp_path, "gguf", settings, placement="output")
    assert result.path == str(file) and result.bytes == file.stat().st_size
    assert sorted(p.name for p in file.parent.iterdir()) == ["it.gguf", "it.md"]
    card = (file.parent / "it.md").read_text()
    assert card.splitlines()[0] == "---" and "\n# it\n" in card and "llama-cli -m it.gguf" in card
    with pytest.raises(OutputError, match=r"it\.gguf exists already"):
        exported(tmp_path, "gguf", settings, placement="output")
    file.unlink()
    with pytest.raises(OutputError, match=r"it\.md exists already"):
        exported(tmp_path, "gguf", settings, placement="output")
    with pytest.raises(ExportError):
        exported(tmp_path, "gguf", settings | {"out": str(tmp_path / "other.gguf")}, placement="every")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "there"]


@pytest.mark.parametrize(
    ("to", "spec", "form"),
    [
        ("hf", {"placement": "every"}, "autobitlinear"),
        (
            "hf",
            {"placement": "none", "activations": "none", "scale": "group-64"},
            "an ordinary checkpoint of code · scale in bf16",
        ),
        ("bf16", {"placement": "none"}, "an ordinary checkpoint of code · scale in bf16"),
        ("hf", {}, "an ordinary checkpoint in bf16"),
    ],
)
def test_transformers(to: str, spec: dict[str, Any], form: str, tmp_path: Path) -> None:
    """What stock transformers loads, compared with the model by it, with tokenizer, configuration and card."""
    result = exported(tmp_path, to, **spec)
    assert result.form == form
    assert result.check.rows[0].reader == "transformers"
    assert result.check.rows[0].agreement.kl < 0.01
    if form.startswith("an ordinary"):  # rounding is all that was done to it
        assert result.check.rows[1].against.endswith("rounded to bf16")
        assert result.check.rows[1].agreement.top1 > 0.998 and result.check.rows[1].agreement.kl < 1e-7
    assert result.check.prompt and result.check.theirs[:4] == result.check.ours[:4] != ""
    assert "is continued by the model with" in (tmp_path / "out" / "README.md").read_text()
    assert load_stock(tmp_path / "out").num_parameters() > 0
    assert {"README.md", "tokenizer.json", "config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("to", "settings", "spec", "says"),
    [
        ("gguf", {}, {"placement": "every"}, "gain per channel"),
        ("bf16", {}, {"placement": "output"}, "no norm in front of"),
        (
            "hf",
            {"form": "bitlinear"},
            {"placement": "none", "scale": "row"},
            "--form bitlinear cannot hold this model",
        ),
        ("hf", {"form": "bitlinear"}, {}, "--form bitlinear holds ternary weights"),
        ("hf", {}, {"placement": "output", "scale": "row"}, "no norm in front of .*one scale per matrix only"),
    ],
)
def test_what_cannot_be_held_leaves_nothing(
    to: str, settings: dict[str, Any], spec: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """A refusal says why and what can hold the model; no directory, whole or partial, is left."""
    with pytest.raises(ExportError, match=says):
        exported(tmp_path, to, settings, **spec)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_reads_wrongly_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that turns the signs of codes is found out by the check, and its directory is gone."""
    right = Bitnet.pack
    monkeypatch.setattr(Bitnet, "pack", staticmethod(lambda codes: right(-codes)))
    with pytest.raises(VerificationError, match="transformers' reading differs"):
        exported(tmp_path, "hf", placement="none")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_card_says_whose_licence_applies(tmp_path: Path) -> None:
    """A base model's own card is asked; where it has none that is said, and where there is no base nothing is."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    assert licence_of(str(folder)) == {"license": "mit"}
    assert licence_of(str(tmp_path)) == {}
    assert licence_of(None) == {}
    for model, says in (
        (str(folder), "license: mit"),
        (str(tmp_path), "could not be read here"),
        (None, "Made from llama-3m by"),
    ):
        write_json(tmp_path / "run.json", {"config": {"model": model, "architecture": "llama-3m"}, "result": {}})
        write_card(tmp_path / "README.md", tmp_path, "it", "hf", "form", Check(why_not="a test"))
        card = (tmp_path / "README.md").read_text()
        assert says in card
        assert ("licence of the base model" in card) == (says == "could not be read here")
        (tmp_path / "README.md").unlink()


def test_the_card_of_what_others_made(tmp_path: Path) -> None:
    """A model that no run made is its own base, with its licence; one that lies in a run (model/, latent/) has the run's (old
    code: both had neither base nor licence)."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text("---\nlicense: mit\n---\n# theirs\n")
    check = Check(why_not="a test")
    write_card(tmp_path / "README.md", theirs, "it", "hf", "form", check)
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card and "Made from theirs by trilobit" in card and str(tmp_path) not in card
    write_card(tmp_path / "README.md", theirs, "it", "hf", "form", check, "someone/theirs")
    assert "base_model: someone/theirs" in (tmp_path / "README.md").read_text()
    write_json(tmp_path / "run.json", {"config": {"model": str(theirs), "placement": "none"}, "result": {"tokens": 7}})
    write_card(tmp_path / "README.md", tmp_path / "model", "it", "hf", "form", check, str(tmp_path / "model"))
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card and "Made from theirs by trilobit" in card and "placement none, tokens 7" in card


def test_a_base_in_a_directory_has_a_name(tmp_path: Path) -> None:
    """A directory is called by its name, model/ by what it belongs to (old code: "Made from model"), with the repository that
    its own card or config.json names; metadata has none of these, which may be a generation further back (old code: the base of
    the base was ours). The command names where the model is."""
    check, base = Check(why_not="a test"), tmp_path / "smol" / "model"
    base.mkdir(parents=True)

    def card(place: str | None = None) -> str:
        write_card(tmp_path / "README.md", base, "it", "hf", "form", check, place=place)
        return (tmp_path / "README.md").read_text()

    assert "Made from smol by" in card() and "base_model" not in card()
    write_json(base / "config.json", {"_name_or_path": "/home/someone/x"})
    assert "Made from smol by" in card()
    write_json(base / "config.json", {"_name_or_path": "someone/smol"})
    assert "Made from smol (someone/smol, says its config.json) by" in card() and "base_model" not in card()
    (base / "README.md").write_text("---\nbase_model: someone/smol\n---\n# base\n")
    assert "Made from smol (made from someone/smol, says its card) by" in card() and "base_model" not in card()
    assert "from_pretrained('out/it')" in card("out/it")
    assert named(str(EMBEDDED)) == ("the 3.5 M Llama that comes with trilobit", None)


@pytest.mark.parametrize("to", ["hf", "gguf", "bf16", "native"])
def test_what_belongs_to_a_model_comes_along(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizer, chat template and the end-of-text tokens of the generation config are in what is written."""
    if to == "native" and not native.available():
        pytest.skip("no C++ compiler has built the kernels")
    monkeypatch.setattr(convert, "verify", lambda *arguments: Check(why_not="a test"))
    place = stored(tmp_path / "latent", settings=SMALL, placement="none")
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    loaded = load(place)
    loaded.model.generation_config.eos_token_id = [0, 7]  # pyright: ignore[reportOptionalMemberAccess]
    hf.write_latent(loaded.model, loaded.plan, tokenizer, tmp_path / "model")
    convert.run(ExportConfig(model=str(tmp_path / "model"), out=str(tmp_path / "out"), to=to))  # pyright: ignore
    if to == "gguf":
        metadata = open_gguf(tmp_path / "out" / "out.gguf").metadata
        assert metadata["tokenizer.chat_template"] == tokenizer.chat_template
        assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
        assert metadata["tokenizer.ggml.tokens"][300] == tokenizer.convert_ids_to_tokens(300)
        return
    read: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [0, 7]


class Heard(Listener):
    def __init__(self) -> None:
        self.told: list[tuple[int, int, float]] = []

    def progress(self, what: str, done: int, total: int, seconds: float) -> None:
        self.told.append((done, total, seconds))


@pytest.mark.parametrize("to", ["native", "hf", "gguf", "bf16"])
def test_progress_is_told_with_its_time(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export tells how far it is, up to the end, and since when (old code: since no time, so that no bar was drawn)."""
    if to == "native" and not native.available():
        pytest.skip("no C++ compiler has built the kernels")
    monkeypatch.setattr(convert, "verify", lambda *arguments: Check(why_not="a test"))
    place, heard = stored(tmp_path / "model", settings=SMALL, placement="none"), Heard()
    convert.run(ExportConfig(model=str(place), out=str(tmp_path / "out"), to=to), heard)  # pyright: ignore[reportArgumentType]
    done, totals, seconds = zip(*heard.told, strict=True)
    assert list(done) == list(range(1, totals[0] + 1)) and set(totals) == {len(done)}
    assert 0 < seconds[0] <= seconds[-1] and list(seconds) == sorted(seconds)


@pytest.mark.parametrize(("to", "spec"), [("hf", {"placement": "every"}), ("bf16", {"placement": "none"})])
def test_above_the_limit_files_are_several(
    to: str, spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards with an index pass the check by stock transformers, are all in the manifest, and are a model to export again."""
    monkeypatch.setattr(convert, "verify", check_here)
    monkeypatch.setattr(verification, "PROBE_WINDOWS", dict.fromkeys(verification.PROBE_WINDOWS, 8))
    for module in (convert, hf):
        monkeypatch.setattr(module, "stream_tensors", partial(stream_tensors, most=1_000_000))
    first = exported(tmp_path, to, **spec)
    shards = sorted(path.name for path in (tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "out" / "model.safetensors").exists()
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert sorted(set(index["weight_map"].values())) == shards
    assert set(shards) < set(read_json(tmp_path / "out" / "manifest.json")["files"])
    assert first.bytes == sum((tmp_path / "out" / name).stat().st_size for name in shards) > index["metadata"]["total_size"]
    assert first.check.rows[0].agreement.top1 > 0.95
    again = convert.run(ExportConfig(model=str(tmp_path / "out"), out=str(tmp_path / "again"), to=to))  # pyright: ignore
    assert again.form == first.form
    for name in shards:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a hub id's licence is looked up there, with a limit of seconds (old code: a name that is none, or a hub that cannot
    be reached, was tried for half a minute)."""
    asked: list[tuple[str, float]] = []

    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            asked.append((name, timeout))
            if name == "no/network":
                raise OSError("no network")
            return type("Info", (), {"card_data": type("Card", (), {"license": "mit"}) if name == "some/one" else None})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    found = [licence_of(name) for name in ("some/one", "no/card", "no/network", "a name", "out/run")]
    assert found == [{"license": "mit"}, {}, {}, {}, {}]
    assert [name for name, _ in asked] == ["some/one", "no/card", "no/network"]
    assert max(seconds for _, seconds in asked) <= 10


@pytest.mark.parametrize("out", ["x.gguf", "x.gguf/"])
def test_a_file_is_not_uploaded(out: str) -> None:
    """However its name is written (old code: a slash at the end let it through)."""
    with pytest.raises(ConfigError, match=r"without \.gguf"):
        ExportConfig(model="x", out=out, to="gguf", push="someone/x")


def test_where_a_base_lies_is_what_its_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative directory that is not seen from here is no repository (old code: base_model: checkpoints/base), a repository
    is one though a folder here has its name; a run of an earlier version says neither."""
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "one").mkdir(parents=True)

    def card(model: str, **said: Any) -> str:
        write_json(tmp_path / "run.json", {"config": {"model": model}, "result": {}} | said)
        write_card(tmp_path / "README.md", tmp_path, "it", "hf", "form", Check(why_not="a test"))
        return (tmp_path / "README.md").read_text()

    lost = card("checkpoints/base", base_place="directory")
    assert "base_model" not in lost and "Made from base by" in lost
    assert "base_model: some/one" in card("some/one", base_place="hub")
    assert "base_model" not in card("some/one", base_place="directory")
    assert "base_model: other/one" in card("other/one") and "base_model" not in card("some/one")


def test_another_licence_has_its_name_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`other` says nothing without them (old code: they were left out); a file beside the base's card is linked to there."""
    text = "---\nlicense: other\nlicense_name: 'a: licence'\nlicense_link: LICENSE\n---\n# base\n"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(text)
    write_card(tmp_path / "README.md", tmp_path / "base", "it", "hf", "form", Check(why_not="a test"))
    read = ModelCard.load(tmp_path / "README.md").data
    assert (read.license, read.license_name, read.license_link) == ("other", "a: licence", "LICENSE")  # pyright: ignore
    info = type("Info", (), {"card_data": ModelCard(text).data})
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: type("Api", (), {"model_info": lambda *a, **k: info})())
    assert licence_of("some/one")["license_link"] == "https://huggingface.co/some/one/blob/main/LICENSE"


@pytest.mark.parametrize(("to", "ternary"), [("hf", True), ("hf", False), ("gguf", False), ("compressed-tensors", False)])
def test_only_ternary_models_are_tagged_so(to: str, ternary: bool, tmp_path: Path) -> None:
    """Old code: every model that was exported by hf, bf16 or gguf."""
    write_card(tmp_path / "README.md", tmp_path, "it", to, "form", Check(why_not="a test"), ternary=ternary)
    own = ["ternary", "1.58-bit"] if ternary else ["compressed-tensors"] if to == "compressed-tensors" else []
    assert ModelCard.load(tmp_path / "README.md").data.tags == [*own, "trilobit"]  # pyright: ignore


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("spec", [{}, {"placement": "none"}])
def test_an_export_replaces_nothing(to: str, spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What appears while it is written stays (old code: it was deleted, or overwritten); an empty directory is no obstacle for
    a directory, through a link, too, and one for a file, before anything is done. Tags say whether the model is ternary."""
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")

    def appear(*arguments: Any) -> Check:
        out.mkdir()
        (out / "mine").write_text("mine")
        return Check(why_not="a test")

    monkeypatch.setattr(convert, "verify", appear)
    with pytest.raises(OutputError, match=f"{out.name} appeared meanwhile"):
        exported(tmp_path, to, {"out": str(out)}, **spec)
    assert [p.name for p in out.iterdir()] == ["mine"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([out.name, "run"])
    (out / "mine").unlink()
    if to == "gguf":
        with pytest.raises(OutputError, match=r"out\.gguf exists already"):
            exported(tmp_path, to, {"out": str(out), "model": "not looked at"}, **spec)
        return
    monkeypatch.setattr(convert, "verify", lambda *arguments: Check(why_not="a test"))
    (tmp_path / "link").symlink_to(out)
    exported(tmp_path, to, {"out": str(tmp_path / "link")}, **spec)
    assert (tmp_path / "link").is_symlink()
    verify_manifest(out)
    assert ("ternary" in (out / "README.md").read_text().split("---")[1]) == bool(spec)


def test_no_place_of_this_machine_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json keeps the name of a repository that it came from, not a directory's (old code: both)."""
    place = load(stored(tmp_path / "latent", settings=SMALL, placement="none"))
    for name, stays in (("/home/someone/x", False), ("someone/x", True)):
        right = type(place.model.config).to_dict
        noted = {"_name_or_path": name, "text_config": {"_name_or_path": name}, "_model_name_or_path": name}
        with monkeypatch.context() as patch:
            patch.setattr(type(place.model.config), "to_dict", lambda self, r=right, n=noted: r(self) | n)
            folder = tmp_path / f"written-{stays}"
            folder.mkdir()
            hf.write_companions(folder, place.model, place.plan, place.tokenizer, "latent", {})
        config = read_json(folder / "config.json")
        assert all((key in config) == stays for key in ("_name_or_path", "_model_name_or_path"))
        assert ("_name_or_path" in config["text_config"]) == stays
        assert ("someone" in "".join(p.read_text() for p in folder.iterdir())) == stays


def test_settings_of_another_target_are_refused() -> None:
    """A choice that the target does not have is an error that names whose it is."""
    for to, choice in (("native", {"type": "q2_0"}), ("gguf", {"layout": "base-3"}), ("bf16", {"form": "dense"})):
        with pytest.raises(ConfigError, match="is a choice of --to"):
            ExportConfig(model="m", out="o", to=to, **choice)  # pyright: ignore[reportArgumentType]


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory goes to the named repository, and weights that lie there give way, but none in folders (old code: an older
    model.safetensors was read instead of the new shards); a refusal of the hub says that what is on disk stays."""
    calls: list[Any] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append((name, exist_ok))

        def list_repo_files(self, repo_id: str) -> list[str]:
            return ["README.md", "model.safetensors", "odd[1].gguf", "trilobit.json", "onnx/model.safetensors"]

        def upload_folder(self, repo_id: str, folder_path: Path, delete_patterns: list[str]) -> str:
            calls.append((repo_id, folder_path, delete_patterns))
            if repo_id == "no/no":
                raise OSError("401")
            return "https://there"

    monkeypatch.setattr(push, "HfApi", Api)
    assert push.push(tmp_path, "me/model") == "https://there"
    assert calls == [
        ("me/model", True),
        ("me/model", tmp_path, ["model.safetensors", "odd[[]1].gguf", "trilobit.json"]),
    ]
    with pytest.raises(OutputError, match="was written, and could not be uploaded to no/no: 401"):
        push.push(tmp_path, "no/no")
