"""Native files: what is written is read, and whatever lies is refused before it decides what memory is read."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infer import fuzz_native_file
from infer.fuzz_native_file import SMALL, join, split
from infer.natives import frozen
from trilobit.errors import ModelError, OutputError
from trilobit.infer import compiler, graph, native_file
from trilobit.infer.engine import Engine
from trilobit.kernels import build, native

NO_COMPILER = build.find_library() is None and build.compiler() is None
pytestmark = pytest.mark.skipif(NO_COMPILER, reason=f"no native library: {build.why_not()}")


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if build.find_library() is None:
        build.build()
    native._library.cache_clear()
    assert native.available()


@pytest.fixture(scope="module")
def model(library: None) -> graph.Graph:
    return compiler.compile(frozen("qwen3", settings=SMALL), "two-bit")


@pytest.fixture(scope="module")
def whole(model: graph.Graph, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / native_file.NAME
    native_file.write(model, path)
    return path.read_bytes()


@pytest.mark.parametrize("memory", ["mapped", "copied", None])
@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({}, {}), ({}, {"activations": "none", "scale": "group-64", "cover": "+embeddings"}), ({}, {"gain": "scalar"}),
        ({"hidden_size": 28, "vocab_size": 31}, {"placement": "none", "scale": "row"}),
        ({"hidden_size": 25, "vocab_size": 31, "num_attention_heads": 5, "num_key_value_heads": 1}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_written_is_read(settings: Any, spec: Any, memory: Any, tmp_path: Path) -> None:
    """Header and tensors come back bit for bit, mapped or copied, for odd sizes too, each tensor where its type may lie
    (old code: a bf16 embedding of odd size left all fp32 tensors after it unreadable)."""
    compiled = compiler.compile(frozen("llama", settings={**SMALL, **settings}, **spec))
    path = tmp_path / native_file.NAME
    native_file.write(compiled, path)
    again = native_file.read(path, memory)
    assert again.header == compiled.header
    assert again.tensors.keys() == compiled.tensors.keys()
    for name, tensor in compiled.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert again.tensors[name].shape == tensor.shape
        assert torch.equal(again.tensors[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    ids = torch.tensor([1, 5, 9, 2])
    assert torch.equal(Engine(again, None, []).logits(ids), Engine(compiled, None, []).logits(ids))


def test_matrices_begin_at_cache_lines(whole: bytes, tmp_path: Path) -> None:
    """The data begins at a multiple of 64 bytes, and so does every packed matrix, mapped or copied."""
    header, data = split(whole)
    assert (len(whole) - len(data)) % 64 == 0
    assert all(e["data_offsets"][0] % 64 == 0 for n, e in header.items() if n.endswith(".codes"))
    (tmp_path / "file").write_bytes(whole)
    for memory in ("mapped", "copied"):
        tensors = native_file.read(tmp_path / "file", memory).tensors
        assert all(t.data_ptr() % 64 == 0 for n, t in tensors.items() if n.endswith(".codes"))


def test_a_safetensors_reader_reads_it(whole: bytes, model: graph.Graph) -> None:
    """It is an ordinary safetensors file: the library that defines them lists the same tensors."""
    from safetensors.torch import load

    assert all(torch.equal(t.view(torch.uint8), model.tensors[n].view(torch.uint8)) for n, t in load(whole).items())
    assert load(whole).keys() == model.tensors.keys()


def test_a_mapped_file_is_not_written(whole: bytes, tmp_path: Path) -> None:
    """Writing into a tensor of a mapped file leaves the file as it is."""
    path = tmp_path / "file"
    path.write_bytes(whole)
    native_file.read(path, "mapped").tensors["norm"].fill_(7)
    assert path.read_bytes() == whole


def test_a_disk_that_refuses(model: graph.Graph, tmp_path: Path) -> None:
    """A folder that is not there is an OutputError that names the file."""
    with pytest.raises(OutputError, match=r"cannot write native\.safetensors: No such file"):
        native_file.write(model, tmp_path / "nowhere" / native_file.NAME)


Header = dict[str, Any]


def _set(*path: Any, to: Any) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        holder: Any = header
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = to(holder.get(path[-1]) if isinstance(holder, dict) else holder[path[-1]]) if callable(to) else to

    return change


def _graph(**values: Any) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"]["graph"].update(values)


def _exchange(a: str, b: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]

    return change


CODES, NORM = "layers.0.q.codes", "layers.0.attention_norm"
LIES: dict[str, tuple[Callable[[Header], Any], str]] = {
    "another format": (_set("__metadata__", "format", to="pt"), "another kind of safetensors file"),
    "no metadata": (lambda h: h.pop("__metadata__"), "another kind of safetensors file"),
    "metadata that is a list": (_set("__metadata__", to=[]), "another kind"),
    "another version": (_set("__metadata__", "version", to="1"), "it has version 1, this program reads version 2: export"),
    "a version that is a number": (_set("__metadata__", "version", to=1), "version"),
    "no graph": (lambda h: h["__metadata__"].pop("graph"), "does not describe a model"),
    "a graph that is a list": (_set("__metadata__", "graph", to=[]), "does not list the fields"),
    "a graph that is deep": (_set("__metadata__", "graph", to=[[[[[]]]]]), "does not list the fields"),
    "a missing tensor": (lambda h: h.pop(NORM), "overlap or leave holes|lacks the tensor"),
    "an extra tensor": (_set("extra", to={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "'extra' that a native model"),
    "an extra layer's tensor": (
        _set("layers.1.q.gain", to={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "layers.1.q.gain"
    ),
    "a place twice": (_set("layers.0.q.bias", to={"dtype": "F32", "shape": [24], "data_offsets": [0, 96]}), "overlap"),
    "another dtype": (_set(NORM, "dtype", to="BF16"), "what cannot be"),
    "another dtype of the same size": (_set("embedding", "dtype", to="F16"), r"embedding is F16 .*, not BF16"),
    "fp32 scales of half the head": (_set("head.scales", "dtype", to="F32"), "what cannot be"),
    "an unknown dtype": (_set(CODES, "dtype", to="I8"), "what cannot be"),
    "a dtype that is a list": (_set(CODES, "dtype", to=["U8"]), "what cannot be"),
    "another shape of the same size": (_set("embedding", "shape", to=[24, 30]), r"embedding is BF16 \[24, 30\]"),
    "a flat shape": (_set("embedding", "shape", to=[720]), r"embedding is BF16 \[720\]"),
    "three dimensions": (_set(NORM, "shape", to=[1, 1, 24]), "what cannot be"),
    "a shape that is empty text": (_set(NORM, "shape", to=""), "what cannot be"),
    "a shape that is text": (_set(NORM, "shape", to="24"), "what cannot be"),
    "a shape that is a map": (_set(NORM, "shape", to={}), "what cannot be"),
    "no shape": (_set(NORM, "shape", to=None), "what cannot be"),
    "a negative size": (_set("embedding", "shape", to=[-30, -24]), "what cannot be"),
    "sizes that overflow": (_set("embedding", "shape", to=[1 << 32, 1 << 32]), "what cannot be"),
    "a size of 2⁶⁴": (_set("embedding", "shape", to=[1 << 64, 24]), "what cannot be"),
    "a size that is a float": (_set(NORM, "shape", to=[24.0]), "what cannot be"),
    "a size that is true": (_set("embedding", "shape", to=[True, 720]), "what cannot be"),
    "an offset that is true": (_set(CODES, "data_offsets", to=[False, 128]), "what cannot be"),
    "offsets backwards": (_set(NORM, "data_offsets", to=lambda o: o[::-1]), "what cannot be"),
    "one offset": (_set(NORM, "data_offsets", to=[0]), "what cannot be"),
    "three offsets": (_set(NORM, "data_offsets", to=[0, 1, 2]), "what cannot be"),
    "a negative offset": (_set(NORM, "data_offsets", to=[-96, 0]), "what cannot be"),
    "an offset beyond the file": (_set("embedding", "data_offsets", to=lambda o: [n + (1 << 40) for n in o]), "holes"),
    "an overlap": (_set(NORM, "data_offsets", to=lambda o: [n - 4 for n in o]), "overlap"),
    "an odd place": (_set(NORM, "data_offsets", to=lambda o: [n + 1 for n in o]), "what cannot be"),
    "an entry that is a number": (_set(NORM, to=3), "what cannot be"),
    "an entry that is text": (_set(NORM, to="F32"), "what cannot be"),
    "an entry that is nothing": (_set(NORM, to=None), "what cannot be"),
    "a name that is not text": (_set("\udc80", to={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "model does not"),
    "two tensors' places exchanged": (_exchange(NORM, CODES), "what cannot be"),
    "another width": (_graph(width=25), "not"),
    "more layers": (_graph(layers=2, windows=[0, 0], rotary=[True, True]), "lacks the tensor layers.1|too few for 2 layers"),
    "a million layers": (
        _graph(layers=1_000_000, windows=[0] * 1_000_000, rotary=[True] * 1_000_000), "too few for 1000000 layers"
    ),
    "a vocabulary of millions": (_graph(vocabulary=(1 << 24) - 1), "not"),
    "a hidden width of a million": (_graph(hidden=(1 << 20) - 1), "not"),
    "more rows than an int": (_graph(heads=(1 << 20) - 1, kv_heads=1, head_size=1 << 19), "a matrix that no engine has"),
    "a head too wide for its sums": (_graph(width=1 << 17), "a matrix that no engine has"),
    "a width that is true": (_graph(width=True), "width = 'True'"),
    "a width that is text": (_graph(width="24"), "width = '24'"),
    "an infinite epsilon": (_graph(eps=1e999), "is not JSON|does not describe"),
    "an epsilon that is no number": (_graph(eps=float("nan")), "does not describe a model"),
    "an integer of many digits": (_graph(eps=10**400), "eps"),
    "another gate": (_graph(gate="gelu"), "gate = 'gelu'"),
    "an int8 layout": (_graph(layout="int8"), "no model has"),
    "half a head": (lambda h: h.pop("head.scales"), "holes|lacks"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_the_header_are_refused(lie: str, whole: bytes, tmp_path: Path) -> None:
    """A header that says what cannot be, or describes a model that its tensors are not, is a ModelError of one line that
    names the file; the same for both ways of reading."""
    change, says = LIES[lie]
    header, data = split(whole)
    change(header)
    path = tmp_path / native_file.NAME
    path.write_bytes(join(header, data))
    with pytest.raises(ModelError, match=says) as caught:
        native_file.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def _with_text(text: bytes, length: int | None = None, pad: bool = True) -> bytes:
    text += b" " * (-(8 + len(text)) % 64 if pad else 0)
    return (len(text) if length is None else length).to_bytes(8, "little") + text


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda f: b"", "no header"),
    "seven bytes": (lambda f: f[:7], "no header"),
    "eight bytes": (lambda f: f[:8], "no header"),
    "half a header": (lambda f: f[:500], "no header"),
    "a byte less": (lambda f: f[:-1], r"take \d+ bytes, and the file holds"),
    "a byte more": (lambda f: f + b"\0", r"take \d+ bytes, and the file holds"),
    "half": (lambda f: f[: len(f) // 2 // 64 * 64], "take"),
    "a header of 2⁶⁴ − 1 bytes": (lambda f: b"\xff" * 8 + f[8:], "no header"),
    "a header as long as the file": (lambda f: len(f).to_bytes(8, "little") + f[8:], "no header"),
    "an empty header": (lambda f: bytes(8) + f[8:], "no header"),
    "a header that is not padded": (lambda f: _with_text(b"{}", pad=False), "no header"),
    "a header larger than any": (lambda f: _with_text(b" " * native_file.MOST_HEADER_BYTES + b"{}" + bytes(54)), "no header"),
    "no JSON": (lambda f: _with_text(b"}{"), "not JSON"),
    "a pickle": (lambda f: _with_text(b"\x80\x04\x95" + bytes(60)), "not JSON"),
    "a list": (lambda f: _with_text(b"[]"), "lists nothing"),
    "text": (lambda f: _with_text(b'"x"'), "lists nothing"),
    "NaN": (lambda f: _with_text(b'{"a": NaN}'), "not JSON"),
    "infinity": (lambda f: _with_text(b'{"a": -Infinity}'), "not JSON"),
    "a number of a million digits": (lambda f: _with_text(b'{"a": ' + b"9" * 1_000_000 + b"}"), "not JSON"),
    "a million nested lists": (lambda f: _with_text(b"[" * 1_000_000), "not JSON"),
    "a million nested maps": (lambda f: _with_text(b'{"a":' * 1_000_000), "not JSON"),
    "a nested graph": (
        lambda f: _with_text(
            json.dumps({"__metadata__": {"format": "trilobit-native", "version": "2", "graph": "[" * 200_000}}).encode()
        ),
        "does not describe a model",
    ),
    "an empty map": (lambda f: _with_text(b"{}"), "another kind"),
    "no UTF-8": (lambda f: _with_text(b'{"\xff\xfe": 1}'), "not JSON"),
    "an ordinary safetensors file": (lambda f: _with_text(b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "another"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_none_are_refused(kind: str, whole: bytes, tmp_path: Path) -> None:
    """Truncated, padded and foreign files, header lengths that are lies, and JSON bombs: a ModelError that says which."""
    change, says = FILES[kind]
    path = tmp_path / native_file.NAME
    path.write_bytes(change(whole))
    for memory in ("mapped", "copied"):
        with pytest.raises(ModelError, match=says):
            native_file.read(path, memory)


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    """A missing file and a folder are ModelErrors that name them."""
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ModelError, match=f"{path} cannot be read: "):
            native_file.read(path)


def test_a_small_file_takes_little_memory(whole: bytes, tmp_path: Path) -> None:
    """A header that describes 200,000 layers in a megabyte is refused within a hundred (old code listed all their tensors
    first: two gigabytes)."""
    header, data = split(whole)
    _graph(layers=200_000, windows=[0] * 200_000, rotary=[True] * 200_000)(header)
    path = tmp_path / "file"
    path.write_bytes(join(header, data))
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="too few for 200000 layers"):
            native_file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_sizes_that_fit_the_file_but_not_each_other_make_no_engine(whole: bytes, tmp_path: Path) -> None:
    """Three key heads for four heads take as many bytes as two: the file is read, and the engine refuses it."""
    header, data = split(whole)
    _graph(kv_heads=3, head_size=6)(header)
    (tmp_path / "file").write_bytes(join(header, data))
    with pytest.raises(ModelError, match="do not fit together"):
        Engine(native_file.read(tmp_path / "file"), None, [])


def test_damaged_content_is_not_judged_but_gives_no_text(model: graph.Graph, whole: bytes, tmp_path: Path) -> None:
    """Any bytes are codes; scales that are NaN give logits that are NaN, and no token."""
    from trilobit.kernels.engine import Sampling

    header, data = split(whole)
    start, end = header["layers.0.o.scales"]["data_offsets"]
    (tmp_path / "file").write_bytes(join(header, data[:start] + b"\xff" * (end - start) + data[end:]))
    engine = Engine(native_file.read(tmp_path / "file"), None, [])
    with pytest.raises(ModelError, match="not finite"):
        next(engine.stream([1, 2], 3, Sampling()))


def test_random_damage(tmp_path: Path) -> None:
    """Three seconds of the fuzzer: everything is refused or runs, and enough of both for it to mean something. (`make fuzz`
    runs it for a minute.)"""
    refused, ran = fuzz_native_file.fuzz(3.0, 11, tmp_path)
    assert refused > 50
    assert ran > 10
