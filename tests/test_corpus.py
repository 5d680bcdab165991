import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trilobit.corpus import documents, fingerprint, is_stream, stdlib_documents
from trilobit.errors import DataError


def texts(data: str | Path, **options) -> list[str]:
    return [document.text for document in documents(str(data), **options)]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path) -> None:
    """JSON lines, plain, gzipped or with a byte order mark, and parquet give one document per row, in order."""
    rows = ["first ✓", "second\nline", "third"]
    write_lines(tmp_path / "a.jsonl", *({"text": row, "id": 1} for row in rows))
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\n"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(raw))
    write_parquet(tmp_path / "d.parquet", text=rows, id=[1, 2, 3])
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet"):
        assert texts(tmp_path / name) == rows, name


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_with_its_size(tmp_path: Path, suffix: str) -> None:
    """A text file is one document, unchanged to the carriage return, and `bytes` is its length in UTF-8."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes("naïve\r\n\ntext ".encode())
    (document,) = documents(str(path))
    assert (document.text, document.bytes) == ("naïve\r\n\ntext ", path.stat().st_size)


def test_folders_globs_and_lists_name_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is everything readable below it, sorted; a list keeps its order and takes no file twice."""
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "B", "a.md": "A", "sub/c.py": "C", "sub/__init__.py": "", "image.png": "\0"}.items():
        (tmp_path / name).write_text(text)
    assert texts(tmp_path) == ["A", "B", "C"]
    assert texts(f"{tmp_path}/**/*") == ["A", "B", "C"]
    assert texts(f"{tmp_path}/b.txt, {tmp_path}/*.md,{tmp_path}") == ["B", "A", "C"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/b.txt") == ["B"]


def test_stdlib_is_split_by_module_path() -> None:
    """stdlib gives each module once, on the side that `stdlib_documents` says."""
    for split in ("train", "heldout"):
        expected = [text for _, text in stdlib_documents(split) if text]
        found = list(documents("stdlib", split=split))
        assert [document.text for document in found] == expected
        assert {document.held_out for document in found} == {split == "heldout"}


def test_the_held_out_side_depends_on_the_text_alone(tmp_path: Path) -> None:
    """About 2 % is held out, and a document keeps its side whatever stands around it; the two sides are the whole."""
    rows = [f"document number {i}" for i in range(3000)]
    write_lines(tmp_path / "a.jsonl", *({"text": row} for row in rows))
    write_lines(tmp_path / "b.jsonl", *({"text": row} for row in reversed(rows[::3])))
    held = texts(tmp_path / "a.jsonl", split="heldout")
    assert 30 <= len(held) <= 90
    assert set(texts(tmp_path / "b.jsonl", split="heldout")) == set(held) & set(rows[::3])
    assert sorted(held + texts(tmp_path / "a.jsonl", split="train")) == sorted(rows)


def _damaged(make: Callable[[Path], Path], keep: float) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        path = make(folder)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * keep)])
        return path

    return damage


def _write(name: str, raw: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(raw)
        return folder / name

    return write


def _empty_folder(folder: Path) -> Path:
    (folder / "sub").mkdir()
    return folder / "sub"


LINES = b"".join(b'{"text": "number %d"}\n' % i for i in range(5000))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_write("a.txt", b""), ["a.txt is empty"]),
        (_write("a.jsonl", b'\n{"text": ""}\n'), ["holds no text"]),
        (_empty_folder, ["sub holds no file that ends in .txt"]),
        (_write("a.csv", b"x,y"), ["a.csv", ".jsonl.gz"]),
        (_write("a.txt", b"abc\0d"), ["a.txt is binary", "byte 3 is NUL", "UTF-16"]),
        (_write("a.txt", b"caf\xe9 "), ["a.txt is not UTF-8", "byte 3 is 0xe9", "iconv"]),
        (_write("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'), ["a.jsonl, line 2 is not UTF-8", "byte 24"]),
        (_write("a.jsonl", b'{"text": "a"}\n\n{"text": \n'), ["a.jsonl, line 3 is not JSON"]),
        (_write("a.json", b'[{"text": "a"}]'), ["line 1 is a JSON list", "jq"]),
        (_write("a.jsonl", b'{"body": "a", "id": 1}'), ["line 1", "'text'", "'body', 'id'", "--text-field"]),
        (_write("a.jsonl", b'{"text": 3}'), ["line 1", "'text' is int, not a string"]),
        (_write("a.jsonl", b'{"text": "ab\\ud800"}'), ["line 1", "character 2", "surrogate"]),
        (_damaged(_write("a.jsonl.gz", gzip.compress(LINES)), 0.5), ["a.jsonl.gz is damaged or cut short", "again"]),
        (_write("a.jsonl.gz", b"not gzip at all"), ["a.jsonl.gz is damaged"]),
        (lambda folder: write_parquet(folder / "a.parquet", body=["a"]), ["a.parquet", "'body'", "--text-field"]),
        (lambda folder: write_parquet(folder / "a.parquet", text=["a", "b", None]), ["row 3", "NoneType"]),
        (lambda folder: write_parquet(folder / "a.parquet", text=[1]), ["row 1", "int, not a string"]),
        (_damaged(lambda folder: write_parquet(folder / "a.parquet", text=["a"]), 0.6), ["a.parquet is damaged"]),
        (lambda folder: folder / "absent.txt", ["no such file", "absent.txt"]),
        (lambda folder: folder / "*.txt", ["no such file", "*.txt"]),
        (lambda folder: Path(f"{_write('a.txt', b'a')(folder)},{folder}/b"), ["no such file", "/b"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, make: Callable[[Path], Path], says: list[str]) -> None:
    """Missing, empty, damaged and foreign files are refused with the file, the line or row, and what to do."""
    with pytest.raises(DataError) as refusal:
        texts(make(tmp_path))
    for words in says:
        assert words in str(refusal.value)


@pytest.mark.parametrize("data", ["notes.txt", "./notes", "~/notes", "/notes", "a/b/c", "*/notes", "notes", "", "a/b.py"])
def test_what_is_not_a_hub_id_is_never_looked_up(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing path is an error about files; the hub is not asked."""
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match="no such file"):
        texts(data)


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/na-me_v1.5:con-fig", ("owner/na-me_v1.5", "con-fig", "train")),
        ("owner/name:config@validation", ("owner/name", "config", "validation")),
        ("owner/name@train[:1%]", ("owner/name", None, "train[:1%]")),
    ],
)
def test_a_hub_id_is_streamed(data: str, arguments: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, configuration and split reach `load_dataset`, streaming, and each row gives a document."""
    calls = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict]:
        calls.append((name, config, split))
        assert streaming
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert is_stream(data)
    assert texts(data, text_field="body") == ["one", "two"]
    assert calls == [arguments]
    with pytest.raises(DataError, match=r"row 1 has no field 'text'.*'body'.*--text-field"):
        texts(data)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub"), "Without a network"),
        (datasets.exceptions.DatasetNotFoundError("'owner/name' is a gated dataset"), "hf auth login"),
        (datasets.exceptions.DatasetNotFoundError("'owner/name' doesn't exist"), "Neither a file or folder"),
        (ValueError("Unknown split 'x'"), "lists its configurations and splits"),
    ],
)
def test_hub_failures_are_data_errors(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, gated, missing and misnamed datasets become DataErrors that say what to do next."""

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as refusal:
        texts("owner/name")
    assert str(error) in str(refusal.value)
    assert says in str(refusal.value)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    """It ignores where files lie, and notices a byte, the order, the kind of file, and a hub dataset's split."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("aa")
        (tmp_path / folder / "b.txt").write_text("b")
    first = fingerprint(str(tmp_path / "one"))
    assert first == fingerprint(str(tmp_path / "two"))
    changed = [fingerprint(f"{tmp_path}/one/b.txt,{tmp_path}/one/a.txt")]
    (tmp_path / "one" / "b.txt").write_text("c")
    changed.append(fingerprint(str(tmp_path / "one")))
    (tmp_path / "two" / "b.txt").rename(tmp_path / "two" / "b.jsonl")
    changed.append(fingerprint(str(tmp_path / "two")))
    changed += [fingerprint(data) for data in ("o/n", "o/n:c", "o/n@test", "stdlib")]
    assert len({first, *changed}) == len(changed) + 1
    assert fingerprint("stdlib") == changed[-1]
