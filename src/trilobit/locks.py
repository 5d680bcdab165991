"""Who writes where: locks on directories, and what killed writers left in them.

A writer holds a lock on its partial directory until it is done or dies; the system lets go when a process ends, however it
ends. Names say which machine wrote, since locks may not reach others.
"""

import hashlib
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from trilobit.errors import OutputError

BOOT = Path("/proc/sys/kernel/random/boot_id")
BEGUN_SECONDS = 60.0  # a directory that is not locked yet is younger


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
            clear_left(folder, "*", locks=locks)
        yield
    finally:
        os.close(handle)


def clear_left(directory: Path, name: str, host: str = "", locks: bool = True) -> None:
    """Remove what killed writers of `name` (a pattern) left in `directory`, as far as it may be removed. host: only what begins
    with that. locks: only what no process holds."""
    for kind, age in (("partial", -math.inf), ("begun", BEGUN_SECONDS)):
        for left in directory.glob(f".{name}.{kind}-{host}*"):
            lock = locked(left)
            with suppress(OSError):  # another one has cleared it
                if (lock is not None or not locks) and time.time() - left.stat().st_mtime > age:
                    discard(left)
            if lock is not None:
                os.close(lock)


def locked(directory: Path) -> int | None:
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


def own_name() -> str:
    """A name that no other writer has, on any machine: containers often give their processes the same numbers."""
    return f"{host_name()}-{os.getpid()}-{secrets.token_hex(4)}"


@cache
def host_name() -> str:
    """Eight digits for the running kernel, whose processes see each other's locks."""
    try:
        name = BOOT.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # not Linux
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def remove_directory(path: Path) -> None:
    """Delete a directory or file if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def discard(path: Path) -> None:
    """Delete a directory or file of ours as far as that goes: another process may be at it, too, or another user own it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
