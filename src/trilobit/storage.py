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
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trilobit.errors import ModelError, OutputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MANIFEST = "manifest.json"
MENTIONED = 3  # of what is in the way
MOST_BYTES = 5_000_000_000  # of a file, as hubs like it
_DTYPES = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.uint8": "U8", "torch.int8": "I8",
    "torch.int32": "I32", "torch.int64": "I64",
}  # fmt: skip
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
BOOT = Path("/proc/sys/kernel/random/boot_id")
BEGUN_SECONDS = 60.0  # a directory that is not locked yet is younger


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON through a temporary file, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial-{_own()}")
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    try:
        partial.write_text(text, encoding="utf-8")
        _fsync(partial)
        os.replace(partial, path)
    except OSError as error:
        _discard(partial)
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
                _discard(file)
            raise


@contextmanager
def _partial_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` while the block runs, held by a lock: one that nobody holds was left by a writer that
    was killed, and is cleared away by the next one of the same name on that machine (locks may not reach others)."""
    partial = target.with_name(f".{target.name}.partial-{_own()}")
    begun = partial.with_name(partial.name.replace(".partial-", ".begun-"))
    held: list[int] = []
    try:
        made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            _fsync(folder.parent)
        _clear_left(target.parent, glob.escape(target.name), f"{_host()}-")
        begun.mkdir()
        held += [lock for lock in [_locked(begun)] if lock is not None]
        os.replace(begun, partial)  # under this name it is held already
        yield partial
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        _discard(begun)
        _discard(partial)
        for lock in held:
            os.close(lock)


def _clear_left(directory: Path, name: str, host: str = "", locks: bool = True) -> None:
    """Remove what killed writers of `name` (a pattern) left in `directory`, as far as it may be removed. host: only what begins
    with that. locks: only what no process holds."""
    for kind, age in (("partial", -math.inf), ("begun", BEGUN_SECONDS)):
        for left in directory.glob(f".{name}.{kind}-{host}*"):
            lock = _locked(left)
            with suppress(OSError):  # another one has cleared it
                if (lock is not None or not locks) and time.time() - left.stat().st_mtime > age:
                    _discard(left)
            if lock is not None:
                os.close(lock)


def _locked(directory: Path) -> int | None:
    """A descriptor that holds `directory` until it is closed, or the process ends; None where another holds it, or there are no
    such locks (Windows, some network file systems)."""
    try:
        import fcntl

        handle = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _own() -> str:
    """A name that no other writer has, on any machine: containers often give their processes the same numbers."""
    return f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


@cache
def _host() -> str:
    """Eight digits for the running kernel, whose processes see each other's locks."""
    try:
        name = BOOT.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # not Linux
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


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


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold `directory` as the only process that works in it, and clear away what killed ones left half-written, on any machine:
    a run goes on where there is room. What a process holds, such as an export into it, is left alone.

    Raises OutputError if another process on this machine holds it. The system lets go when a process ends, however it ends.
    Where there are no such locks (Windows, some network file systems), nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except BlockingIOError as error:
            raise OutputError(f"{directory} is in use: another process is working in it.") from error
        except OSError:  # a file system without locks
            locks = False
        for folder in (directory, directory / "checkpoints"):
            _clear_left(folder, "*", locks=locks)
        yield
    finally:
        os.close(handle)


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


def weights_fingerprint(model: "nn.Module") -> str:
    """SHA-256 of every parameter's name, dtype, shape and bytes, which no device and no number of threads changes."""
    import torch

    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(repr((name, str(parameter.dtype), tuple(parameter.shape))).encode())
        found.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_tensors(tensors: "dict[str, Tensor]", path: Path) -> None:
    """Write a safetensors file. Raises OutputError where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"cannot write {path.name}: {error}. Nothing was left behind.") from error


@dataclass(frozen=True)
class Entry:
    """A tensor to be stored, and how to get it when its turn comes."""

    name: str
    dtype: "torch.dtype"
    shape: tuple[int, ...]
    read: Callable[[], "Tensor"]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stream_tensors(
    entries: list[Entry],
    directory: Path,
    stem: str = "model",
    most: int = MOST_BYTES,
    each: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write entries as STEM.safetensors with one tensor in memory at a time; as several files with an index where they hold
    more than `most` bytes. each: told how many are written, and of how many. Raises OutputError where the disk refuses."""
    import torch

    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > most:
            shards.append([])
        shards[-1].append(entry)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        size = sum(entry.bytes for entry in entries)
        write_json(directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    written = 0
    for name, shard in zip(names, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in shard:
            header[entry.name] = {
                "dtype": _DTYPES[str(entry.dtype)], "shape": list(entry.shape), "data_offsets": [start, start + entry.bytes],
            }  # fmt: skip
            start += entry.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        try:
            with (directory / name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for entry in shard:
                    tensor = entry.read().detach().to("cpu", entry.dtype).contiguous()
                    assert tensor.shape == entry.shape, (entry.name, tensor.shape, entry.shape)
                    data: Any = tensor.view(-1).view(torch.uint8).numpy()
                    file.write(data.data)  # not tofile, which does not notice that the disk is full for the last bytes
                    written += 1
                    each(written, len(entries))
        except OSError as error:
            raise OutputError(f"cannot write {name}: {error.strerror or error}. Nothing was left behind.") from error


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step where the kernel can (Linux), else by two renames."""
    try:
        swapped = ctypes.CDLL(None).renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        swapped = False
    if swapped:
        return
    aside = old.with_name(f".{old.name}.replaced-{_own()}")
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


def remove_directory(path: Path) -> None:
    """Delete a directory or file if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _discard(path: Path) -> None:
    """Delete a directory or file of ours as far as that goes: another process may be at it, too, or another user own it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
