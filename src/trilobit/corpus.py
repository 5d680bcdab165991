"""Where text comes from: the standard library, files, or a dataset on the hub. No tokens here.

`--data` is one string:

  stdlib                        the running Python's own source, the same few megabytes on every machine
  PATH[,PATH...]                files, folders (everything readable below, sorted) and globs
  OWNER/NAME[:CONFIG][@SPLIT]   a dataset on the Hugging Face hub, streamed; split "train" unless given

A text file is one document, unchanged. A .raw file is in WikiText's layout and is read as the field's perplexity scripts
read that data set: its lines, joined by a blank line (WikiText-2 with SmolLM2 then gives the usual 28.74, not 28.69).

A string that looks like a path and does not exist is an error, never a look-up on the hub. Documents arrive one at a
time, in an order that depends on the text alone. Damage is refused with its place (file, line or row, byte), because a
corpus that is silently half as long trains a worse model and nobody learns why. Empty files and empty text fields
between others are passed over; a corpus without any text is refused.

About 2 % is held out by content: sha256 of the text decides (of stdlib 6 %, by module path), so that a document stays
on its side whatever is added around it, and copies of it stay on the same side.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trilobit.errors import DataError

EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
WHOLE_FILES = (".txt", ".raw", ".md", ".py")
LINE_FILES = (".jsonl", ".json", ".jsonl.gz")
SUFFIXES = (*WHOLE_FILES, *LINE_FILES, ".parquet")
HELD_OUT_FRACTION = 0.02
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[\w.+-]+))?(?:@(?P<split>\w[\w.\[\]:%+-]*))?")

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Document:
    """One text, its size in bytes of UTF-8, and the side it falls on."""

    text: str
    bytes: int
    held_out: bool


@dataclass(frozen=True)
class Hub:
    """A dataset on the hub, as written in `--data`."""

    name: str
    config: str | None
    split: str


def documents(data: str, *, text_field: str = "text", split: Split | None = None) -> Iterator[Document]:
    """Yield the documents of `data`, only those on one side if `split` is given.

    `text_field` is the column of JSON lines, parquet and hub datasets that holds the text.
    Raises DataError, saying where, for anything missing, damaged, not text, or without any text at all.
    """
    found = False
    for document in _all_documents(data, text_field):
        found = True
        if split is None or document.held_out == (split == "heldout"):
            yield document
    if not found:
        raise DataError(f"--data {data} holds no text: everything in it is empty.")


def overlap(one: str, other: str) -> bool:
    """Whether two `--data` strings name a file in common, or the same data set, however they are spelt. The two parts of
    stdlib have nothing in common. Raises DataError if either is nothing we can read."""
    first, second = _source(one), _source(other)
    if isinstance(first, list) and isinstance(second, list):
        return not {path.resolve() for path in first}.isdisjoint(path.resolve() for path in second)
    return first == second != "stdlib"


def is_stream(data: str) -> bool:
    """True if `data` is read over the network and may have no end. Raises DataError if it is nothing we can read."""
    return isinstance(_source(data), Hub)


def fingerprint(data: str) -> str:
    """Hex sha256 of what `documents` will read, without regard to where files lie.

    Files: kind and bytes of each, in order. stdlib: module paths and texts. Hub: name, configuration and split, no
    revision: finding that out needs the network, and what was cached must stay usable without it.
    """
    source = _source(data)
    parts: Iterator[bytes] | list[bytes]
    if isinstance(source, Hub):
        parts = [f"hub {source.name} {source.config} {source.split}".encode()]
    elif source == "stdlib":
        parts = (part.encode() for split in _SPLITS for pair in stdlib_documents(split) for part in pair)
    else:
        parts = (part for path in source for part in (_suffix(path).encode(), _file_digest(path)))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def stdlib_documents(split: Split) -> Iterator[tuple[str, str]]:
    """Yield (module path, source with docstrings) of the running Python's standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - EXCLUDED  # site-packages may be vast
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths):
        name = path.relative_to(root)
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 16
        if held_out == (split == "heldout"):
            with tokenize.open(path) as file:
                yield name.as_posix(), file.read()


_SPLITS: tuple[Split, Split] = ("train", "heldout")


def _source(data: str) -> Literal["stdlib"] | list[Path] | Hub:
    """Decide what a `--data` string means."""
    if data == "stdlib":
        return "stdlib"
    whole = Path(data).expanduser()
    if data and os.path.exists(whole):  # unlike Path.exists, False for a name that is too long
        return _files_of(whole)
    if "," in data:
        paths = [path for part in data.split(",") if part.strip() for path in _part(part.strip())]
        return list({path.resolve(): path for path in paths}.values())
    if not _looks_like_path(data) and (match := HUB_ID.fullmatch(data)):
        return Hub(match["name"], match["config"], match["split"] or "train")
    return _part(data)


def _looks_like_path(data: str) -> bool:
    file_suffix = re.search(r"\.[A-Za-z]\w*$", data.partition("@")[0].partition(":")[0])
    return data.startswith((".", "/", "~")) or any(c in data.partition("@")[0] for c in "*?[") or bool(file_suffix)


def _part(part: str) -> list[Path]:
    path = Path(part).expanduser()
    if part and os.path.exists(path):
        return _files_of(path)
    if any(c in part for c in "*?["):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [path for path in matches if path.is_file() and _is_readable_kind(path)]
        if files:
            return files
        raise DataError(f"no such file: nothing that matches --data {part} ends in {', '.join(SUFFIXES)}.")
    raise DataError(
        f"no such file: --data {part}. Give 'stdlib', existing files, folders or globs (separated by commas), or a "
        "dataset on the hub as OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME:CONFIG@SPLIT."
    )


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_readable_kind(file))
        if not files:
            raise DataError(f"the folder {path} holds no file that ends in {', '.join(SUFFIXES)}.")
        return files
    if not _is_readable_kind(path):
        raise DataError(f"{path} is of a kind that cannot be read: give one that ends in {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")
    return [path]


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(SUFFIXES) if path.name.lower().endswith(suffix)), "")


def _is_readable_kind(path: Path) -> bool:
    return _suffix(path) != ""


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _all_documents(data: str, text_field: str) -> Iterator[Document]:
    source = _source(data)
    if source == "stdlib":
        for split in _SPLITS:
            for _, text in stdlib_documents(split):
                if text:
                    yield Document(text, len(text.encode()), split == "heldout")
        return
    texts = _from_hub(source, text_field) if isinstance(source, Hub) else _from_files(source, text_field)
    for place, text in texts:
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: character {error.start} is half of a surrogate pair, not text.") from error
        if encoded:
            held_out = int.from_bytes(hashlib.sha256(encoded).digest()[:2], "big") < 65536 * HELD_OUT_FRACTION
            yield Document(text, len(encoded), held_out)


def _from_files(paths: list[Path], text_field: str) -> Iterator[tuple[str, str]]:
    for path in paths:
        suffix = _suffix(path)
        try:
            if suffix in WHOLE_FILES:
                text = _decoded(path.read_bytes(), str(path), 0).removeprefix("\ufeff")
                yield str(path), "\n\n".join(text.split("\n")) if suffix == ".raw" else text
            elif suffix == ".parquet":
                yield from _from_parquet(path, text_field)
            else:
                yield from _from_lines(path, text_field)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged or cut short: {error}. Copy or download it again.") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decoded(raw: bytes, place: str, offset: int) -> str:
    """`raw` as UTF-8; `offset` is where it starts in its file (in the unpacked text, for gzip)."""
    if (zero := raw.find(b"\0")) >= 0:
        raise DataError(f"{place} is binary: byte {offset + zero} is NUL. Give UTF-8 text (UTF-16: convert it first).")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte {offset + error.start} is 0x{raw[error.start]:02x}"
        raise DataError(f"{place} is not UTF-8: {bad}. Convert it (iconv -f LATIN1 -t UTF-8).") from error


def _from_lines(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    offset = 0
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}, line {number}"
            line = _decoded(raw, place, offset).removeprefix("\ufeff").strip()
            offset += len(raw)
            if not line:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not JSON: {error}. One object per line is needed.") from error
            if not isinstance(row, dict):
                raise DataError(f"{place} is a JSON {type(row).__name__}. One object per line is needed (jq -c '.[]').")
            yield place, _text_of(row, text_field, place)


def _from_parquet(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                _text_of(dict.fromkeys(file.schema_arrow.names), text_field, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    place = f"{path}, row {number}"
                    yield place, _text_of({text_field: text}, text_field, place)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or not parquet: {error}. Copy or download it again.") from error


def _text_of(row: dict[str, Any], text_field: str, place: str) -> str:
    if text_field not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{place} has no field {text_field!r}. Its fields: {names}; choose one with --text-field.")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{place}: the field {text_field!r} is {type(text).__name__}, not a string; see --text-field.")
    return text


def _from_hub(hub: Hub, text_field: str) -> Iterator[tuple[str, str]]:
    import datasets

    try:
        rows = datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
        for number, row in enumerate(rows, 1):
            place = f"{hub.name}, split {hub.split}, row {number}"
            yield place, _text_of(dict(row), text_field, place)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises nearly every kind there is
        raise DataError(f"cannot read the hub dataset {hub.name}: {error} {_hub_advice(hub, error)}") from error


def _hub_advice(hub: Hub, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    page = f"https://huggingface.co/datasets/{hub.name}"
    if "gated" in str(error).lower():
        return f"Ask for access at {page}, then log in: hf auth login."
    if isinstance(error, DatasetNotFoundError):
        return f"Neither a file or folder of that name nor {page} can be found; if it is private: hf auth login."
    if isinstance(error, (ConnectionError, TimeoutError)):
        return "Without a network, give local files or --data stdlib."
    return f"{page} lists its configurations and splits (--data OWNER/NAME:CONFIG@SPLIT); local files always work."
