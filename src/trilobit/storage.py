"""Directories that are either whole or absent.

Whatever trilobit leaves on disk is written into a temporary directory beside its target, flushed, listed in a manifest
with the sha256 of every file, and renamed into place; a reader that finds no valid manifest finds nothing. A process
that is killed at any instant leaves the previous state. Only safetensors and JSON are written: no pickle in any form.
"""

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trilobit.errors import ModelError, OutputError
from trilobit.locks import clear_left, discard, host_name, locked, own_name

MANIFEST = "manifest.json"
MENTIONED = 3  # of what is in the way
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON through a temporary file, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial-{own_name()}")
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    try:
        partial.write_text(text, encoding="utf-8")
        _fsync(partial)
        os.replace(partial, path)
    except OSError as error:
        discard(partial)
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind.") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error


@contextmanager
def atomic_directory(
    target: Path, known: dict[str, dict[str, Any]] | None = None, replace: bool = True, new: bool = False
) -> Iterator[Path]:  # fmt: skip
    """Give a temporary directory that becomes `target`, with a manifest, when the block ends without an exception.

    An existing `target` is replaced only at that moment. known: manifest entries (`flushed`) of files that are on disk
    already, and need not be read again for their sha256. replace: False leaves a whole `target` that another process has made
    meanwhile, which somebody may be reading, as it is. new: nothing is replaced but an empty directory. Raises OutputError when
    the disk refuses, or when something that may not be replaced has appeared.
    """
    with _partial_directory(target) as partial:
        yield partial
        _seal(partial, known or {})
        if not replace and is_whole(target):
            return
        if new:
            _rename_new(partial, target)
        elif target.exists():
            _exchange(partial, target)  # what was there is now `partial`, and is removed
        else:
            os.replace(partial, target)
        _fsync(target.parent)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a temporary directory whose files are moved beside `target`, the file of that name first, when the block ends
    without an exception. Nothing is replaced. Raises OutputError, and takes back what was moved, when the disk refuses or a
    name is taken; a process that is killed in between leaves a whole `target` without what goes with it."""
    with _partial_directory(target) as partial:
        yield partial
        moved: list[Path] = []
        try:
            files = sorted(partial.iterdir(), key=lambda file: (file.name != target.name, file.name))
            for file in files:
                flushed(file)
            for file in files:
                _move_new(file, target.with_name(file.name))
                moved.append(target.with_name(file.name))
            _fsync(target.parent)
        except BaseException:
            for file in moved:
                discard(file)
            raise


@contextmanager
def _partial_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` while the block runs, held by a lock: one that nobody holds was left by a writer that
    was killed, and is cleared away by the next one of the same name on that machine (locks may not reach others)."""
    partial = target.with_name(f".{target.name}.partial-{own_name()}")
    begun = partial.with_name(partial.name.replace(".partial-", ".begun-"))
    held: list[int] = []
    try:
        made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            _fsync(folder.parent)
        clear_left(target.parent, glob.escape(target.name), f"{host_name()}-")
        begun.mkdir()
        held += [lock for lock in [locked(begun)] if lock is not None]
        os.replace(begun, partial)  # under this name it is held already
        yield partial
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        discard(begun)
        discard(partial)
        for lock in held:
            os.close(lock)


def is_whole(directory: Path) -> bool:
    """True when the manifest is there and every file it lists has the listed size."""
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def verify_manifest(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Raise ModelError naming the first file whose size or sha256 differs from the manifest, or a missing manifest.

    part, parts: read only every `parts`-th file, from the `part`-th on, where others read the rest.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise ModelError(f"{directory} has no {MANIFEST}: it was not completely written.")
    try:
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in read_json(path)["files"].items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: it does not list files with their bytes and sha256.") from error
    for name, size, digest in files[part::parts]:
        file = directory / name
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != digest:
            raise ModelError(f"{file} is missing or damaged: it does not match {path}.")


def recorded_sha256(directory: Path, name: str) -> str:
    """What the manifest of `directory` says of a file, without reading the file."""
    return read_json(directory / MANIFEST)["files"][name]["sha256"]


def require_new_directory(path: Path, hint: str) -> None:
    """Raise OutputError if `path` exists, or if the nearest existing folder above it cannot be written."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        above = path
        while not above.exists():
            above = above.parent
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    if taken:
        raise OutputError(f"{path} exists already. {hint}")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"cannot write {path}: {above} is not a writable folder.")


def require_new_file(path: Path, hint: str) -> None:
    """As require_new_directory, for a file: an empty directory of that name, or a link to nothing, is in the way, too."""
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already. {hint}")
    require_new_directory(path, hint)


def require_new_run(path: Path) -> None:
    """As require_new_directory, for what --resume can continue: says whether a run is in the way, or what else."""
    try:
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    except OSError:  # require_new_directory says what is wrong
        names = []
    other = f"hoose another name with --out {path}-2."
    if "run.json" in names:
        require_new_directory(path, f"Continue it with --resume, or c{other}")
    more = f" and {len(names) - MENTIONED} more" if len(names) > MENTIONED else ""
    there = f"It holds no run, but {', '.join(names[:MENTIONED])}{more}" if names else "It is a file"
    require_new_directory(path, f"{there}: c{other}")


def require_free_space(path: Path, needed: int, purpose: str) -> None:
    """Raise OutputError if the disk that will hold `path` has fewer than `needed` bytes free."""
    above = path
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if free < needed:
        raise OutputError(f"{purpose} needs {needed / 1e9:.2f} GB under {path}, but {free / 1e9:.2f} GB are free.")


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step where the kernel can (Linux), else by two renames."""
    try:
        swapped = ctypes.CDLL(None).renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        swapped = False
    if swapped:
        return
    aside = old.with_name(f".{old.name}.replaced-{own_name()}")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def _rename_new(directory: Path, target: Path) -> None:
    """Rename to a name that nothing has, or an empty directory: of directories the system replaces no others."""
    try:
        os.rename(directory, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(target):
            raise _appeared(target) from error
        raise


def _move_new(file: Path, target: Path) -> None:
    """Move to a name that nothing has: in one step where there are hard links, which replace nothing, else after a look."""
    try:
        os.link(file, target)
    except OSError as error:
        if os.path.lexists(target):
            raise _appeared(target) from error
        os.replace(file, target)


def _appeared(target: Path) -> OutputError:
    return OutputError(
        f"{target} appeared meanwhile, and stays as it is. Nothing of this was left behind: choose another name."
    )


def flushed(path: Path) -> dict[str, Any]:
    """The manifest entry of a file that was just written, once it is on disk."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _seal(directory: Path, known: dict[str, dict[str, Any]]) -> None:
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        files[name] = known[name] if name in known else flushed(path)
    if missing := sorted(known.keys() - files.keys()):
        raise OutputError(
            f"{directory} lacks {', '.join(missing)}, which another rank has written: is it the same folder for all?"
        )
    write_json(directory / MANIFEST, {"files": files})
    _fsync(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
