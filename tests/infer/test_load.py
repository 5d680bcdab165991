"""Loading: what is refused, in which words, and that nothing but a TrilobitError comes out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers.utils.hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from infer.checkpoints import byte_model, byte_tokenizer, save
from trilobit.errors import ModelError
from trilobit.export.hf import write_latent, write_model
from trilobit.infer import hub
from trilobit.infer import load as load_module
from trilobit.infer.load import load, load_pretrained, locate
from trilobit.infer.loaded import check_tokenizer, load_tokenizer, pick_device
from trilobit.nn.packed import PackedLinear
from trilobit.surgery.ternary import TernarySpec, ternarize

WEIGHTS = "model.safetensors"
DROPPED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"))


def test_an_ordinary_checkpoint_loads_in_eval_mode(checkpoint: Path) -> None:
    """A directory transformers wrote gives its model in fp32, its tokenizer, and no plan."""
    loaded = load(checkpoint)
    assert loaded.plan is None
    assert loaded.form == "full precision"
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    expected = byte_model().state_dict()
    assert all(torch.equal(expected[name], value) for name, value in loaded.model.state_dict().items())
    assert loaded.tokenizer("é")["input_ids"] == byte_tokenizer()("é")["input_ids"]


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _change_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def _change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def _without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without("config.json"), "is not a checkpoint directory: it has no config.json"),
        (_cut, "damaged or truncated"),
        (_text(WEIGHTS, ""), "damaged or truncated"),
        (_without(WEIGHTS), "no file named model.safetensors"),
        (_change_weights(lambda t: t.pop(DROPPED)), f"lacks 1 of the model's weights \\({DROPPED}"),
        (_change_weights(lambda t: t.update({DROPPED: torch.zeros(3, 3)})), rf"{DROPPED} is \(3, 3\), not \(48, 32\)"),
        (lambda folder: byte_tokenizer(merges=("a b",)).save_pretrained(folder), "an id 259, but the embedding has 259"),
        (_without("tokenizer.json", "tokenizer_config.json"), "the tokenizer of .* could not be loaded"),
        (_text("tokenizer.json", "{"), "the tokenizer of .* could not be loaded"),
        (_text("config.json", "{"), "not a valid JSON"),
        (_text("config.json", "[]"), "model_type"),
        (_change_json("config.json", model_type="nosuch"), "nosuch"),
        (_change_json("config.json", model_type="t5"), "T5Config"),
        (_change_json("config.json", hidden_size="many"), "expected int, got str"),
        (_change_json("config.json", num_attention_heads=0), "could not be loaded"),
        (_change_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "quantised checkpoint"),
    ],
)
def test_damage_is_named(checkpoint: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str) -> None:
    """Whatever is wrong with a checkpoint directory, a ModelError of one line names the directory and the fault."""
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(ModelError, match=says) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_added_tokens_may_lie_beyond_the_embedding() -> None:
    """Added tokens the embedding lacks do not count (Gemma 3, Code Llama); an own one does, and so does one that ends texts."""
    model = byte_model()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"])
    assert tokenizer.convert_tokens_to_ids("<image>") == model.get_input_embeddings().num_embeddings == 259
    check_tokenizer("here", model, tokenizer)
    for role in ("eos_token", "bos_token"):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({role: "<new>"})
        with pytest.raises(ModelError, match="an id 259, but the embedding has 259"):
            check_tokenizer("here", model, tokenizer)
    with pytest.raises(ModelError, match="an id 259, but the embedding has 259"):
        check_tokenizer("here", model, byte_tokenizer(merges=("a b",)))


@pytest.mark.parametrize("source", ["/no/such/model", "./nothing", "a/b/c"])
def test_a_missing_path_is_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a path and is not there is an error at once; the hub is not asked."""
    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", Mock(side_effect=AssertionError("asked the hub")))
    with pytest.raises(ModelError, match="there is no"):
        load(source)


def _response() -> Mock:
    return Mock(status_code=404, headers={}, url="https://huggingface.co")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError("403", response=_response()), "someone/model is gated: accept its licence .*hf auth login"),
        (RepositoryNotFoundError("404", response=_response()), "neither a directory here nor a model on the hub"),
        (LocalEntryNotFoundError("offline"), "not a directory here, and the hub cannot be reached"),
        (HfHubHTTPError("500 boom", response=_response()), "someone/model could not be loaded"),
        (ConnectionError("no route to host"), "not a directory here, and the hub cannot be reached"),
    ],
)
def test_what_the_hub_says_is_passed_on(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gated, unknown and unreachable hub models each say what to do, though transformers wraps the hub's errors."""
    monkeypatch.setattr(hub, "HfApi", Mock(return_value=Mock(model_info=Mock(side_effect=error))))
    for module in (transformers.utils.hub, load_module):
        monkeypatch.setattr(module, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(ModelError, match=says):
        load("someone/model")


def test_an_unreachable_hub_is_asked_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be reached, no download is tried (old code: each of several for half a minute)."""
    for module in (transformers.utils.hub, load_module):
        monkeypatch.setattr(module, "hf_hub_download", Mock(side_effect=AssertionError("tried to download")))
    ask = Mock(side_effect=OSError("Name or service not known"))
    monkeypatch.setattr(hub, "HfApi", Mock(return_value=Mock(model_info=ask)))
    for read in (load, load_pretrained, load_tokenizer, locate):
        with pytest.raises(ModelError, match=r"^someone/model is not a directory here, and the hub cannot be reached\.$"):
            read("someone/model")
    assert ask.call_count == 4


def test_a_hub_repository_that_trilobit_wrote_is_read_as_such(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id with trilobit.json gives the ternary model (old code: "a quantised checkpoint"); its files are checked."""
    folder, loaded = tmp_path / "model", load_pretrained(str(checkpoint))
    surgery = ternarize(loaded.model)
    write_model(loaded.model, surgery.plan, loaded.tokenizer, folder, torch.randint(3, 200, (4, 17)))
    monkeypatch.setattr(hub, "HfApi", Mock())
    monkeypatch.setattr(load_module, "hf_hub_download", lambda source, name: str(folder / name))
    monkeypatch.setattr(load_module, "snapshot_download", lambda source: str(folder))
    again = load("someone/ternary")
    assert again.plan == surgery.plan
    assert any(isinstance(module, PackedLinear) for module in again.model.modules())
    (weights,) = folder.glob("*.safetensors")  # bitnet or, where int8 flips of a random model are too many, packed
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged"):
        load("someone/ternary")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("settings", [{}, {"cover": "+embeddings"}, {"activations": "none", "placement": "none"}])
def test_dtype_is_that_of_what_is_not_ternary(checkpoint: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """load(dtype=bf16) of a ternary model computes near the fp32 one; codes, scales and RoPE's angles keep their precision."""
    folder, loaded = tmp_path / "model", load_pretrained(str(checkpoint))
    surgery = ternarize(loaded.model, TernarySpec(**settings))
    ids = torch.randint(3, 200, (4, 17))
    write_model(loaded.model, surgery.plan, loaded.tokenizer, folder, ids)
    exact, half = load(folder).model, load(folder, dtype=torch.bfloat16).model
    kinds = {p.dtype for n, p in half.named_parameters() if "rms_norm" not in n}
    assert kinds == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} <= {torch.int8, torch.float32}
    with torch.no_grad():
        a, b = (model(input_ids=ids, use_cache=False).logits.float() for model in (exact, half))
    assert not torch.equal(a, b)
    assert (a - b).norm() <= 0.05 * a.norm()


def test_what_was_written_has_siblings(checkpoint: Path, tmp_path: Path) -> None:
    """Linears of a directory of ours that read the same input know of each other when it is loaded (nn/siblings.py)."""
    loaded = load_pretrained(str(checkpoint))
    surgery = ternarize(loaded.model, TernarySpec(placement="output", scale="row"))
    written = write_model(loaded.model, surgery.plan, loaded.tokenizer, tmp_path / "model", torch.randint(3, 200, (4, 17)))
    assert written.form == "packed"
    mlp = load(tmp_path / "model").model.get_submodule("model.layers.0.mlp")
    assert mlp.gate_proj.siblings is mlp.up_proj.siblings is not None


def test_what_is_ternary_already_is_no_ordinary_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """latent/ is refused as a start of tuning, a control's without surgery is not (old code: its inserted norms were dropped
    without a word, and another function was tuned)."""
    loaded = load_pretrained(str(checkpoint))
    write_latent(loaded.model, None, loaded.tokenizer, tmp_path / "control")
    assert load_pretrained(str(tmp_path / "control")).plan is None
    plan = ternarize(loaded.model).plan
    write_latent(loaded.model, plan, loaded.tokenizer, tmp_path / "latent")
    with pytest.raises(ModelError, match="latent is ternary already"):
        load_pretrained(str(tmp_path / "latent"))


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    """A run directory without model/ is unfinished, and the way on is --resume."""
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="has not finished: continue it with --resume"):
        load(tmp_path)


def test_truncation_and_padding_of_a_tokenizer_file_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    """A tokenizer.json saved while truncating to 4 and padding to 16 still encodes a text whole (old code: 16 ids)."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    _change_json("tokenizer.json", truncation=truncation, padding=padding)(folder)
    tokenizer = load_pretrained(str(folder)).tokenizer
    assert len(tokenizer.backend_tokenizer.encode("abcdefghij", add_special_tokens=False).ids) == 10


def test_devices() -> None:
    """auto is always there; a device that is not is refused with the flag's name."""
    assert pick_device("auto").type in ("cpu", "cuda")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match="--device nosuch cannot be used here"):
        pick_device("nosuch")
    for kind in ("meta", "mps"):
        with pytest.raises(ModelError, match=f"--device {kind} cannot be used here: only cpu and cuda are supported"):
            pick_device(kind)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="--device cuda cannot be used here"):
            pick_device("cuda")


def test_a_misspelt_run_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """out/NAME is a run of ours, or missing; nothing is asked of the network."""

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(load_module, "hf_hub_download", ask)
    with pytest.raises(ModelError, match="out/nothing-there"):
        load("out/nothing-there")
