"""Directories on disk are whole or absent, whatever happens to the writer."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trilobit import locks, storage
from trilobit.errors import ModelError, OutputError
from trilobit.locks import alone_in
from trilobit.storage import MANIFEST, atomic_directory, is_whole, verify_manifest, write_json

KILLED = """
import os, sys
from pathlib import Path
from trilobit import locks, storage
where = sys.argv[2]
def die(*args):
    os._exit(9)
if where == "seal":
    storage._seal = die
if where == "swap":
    replace = os.replace
    os.replace = lambda a, b: replace(a, b) if ".partial-" not in Path(a).name else die()
with storage.atomic_directory(Path(sys.argv[1])) as directory:
    (directory / "a.json").write_text("new")
    if where == "block":
        die()
"""


def make(target: Path, text: str) -> None:
    with atomic_directory(target) as directory:
        (directory / "a.json").write_text(text)
        (directory / "deep").mkdir()
        (directory / "deep" / "b.bin").write_bytes(bytes(range(256)))


def only(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_written_directory_is_whole(tmp_path: Path) -> None:
    """A finished block leaves the target alone beside nothing else, every file listed, and it verifies."""
    target = tmp_path / "new" / "out"
    make(target, "first")
    verify_manifest(target)
    assert is_whole(target)
    assert only(target.parent) == ["out"]
    assert set(json.loads((target / MANIFEST).read_text())["files"]) == {"a.json", "deep/b.bin"}


def test_one_process_at_a_time_works_in_a_directory(tmp_path: Path) -> None:
    """While a process is alone in a directory another is refused; after it, or after it was killed, the next one gets in and
    finds nothing half-written, and what is whole stays."""
    make(tmp_path / "step-1", "whole")
    for left in (tmp_path / ".model.partial-1", tmp_path / "checkpoints" / ".step-2.partial-1"):
        left.mkdir(parents=True)
        (left / "half").write_text("")
    code = "import os, sys; from pathlib import Path; from trilobit.locks import alone_in\n"
    code += "with alone_in(Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read(); os._exit(9)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "in\n"
        with pytest.raises(OutputError, match="is in use: another process"), alone_in(tmp_path):
            pass
        process.stdin.close()
    for _ in range(2):
        with alone_in(tmp_path):
            assert only(tmp_path) == ["checkpoints", "step-1"]
            assert only(tmp_path / "checkpoints") == []
    verify_manifest(tmp_path / "step-1")


def test_files_are_for_everyone_the_umask_lets(tmp_path: Path) -> None:
    """Also those that a library made for their owner alone."""
    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out") as directory:
            (directory / "private").write_text("")
            (directory / "private").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o640


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """A second write leaves only its own files, and the first is untouched until the block ends."""
    target = tmp_path / "out"
    make(target, "first")
    with atomic_directory(target) as directory:
        (directory / "c.json").write_text("second")
        assert (target / "a.json").read_text() == "first"
        verify_manifest(target)
    verify_manifest(target)
    assert only(target) == ["c.json", MANIFEST]
    assert only(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_the_block_leaves_the_old_state(tmp_path: Path, error: type[BaseException]) -> None:
    """An exception inside the block comes out as itself; the old directory stays and nothing is left beside it."""
    target = tmp_path / "out"
    make(target, "first")
    with pytest.raises(error), atomic_directory(target) as directory:  # noqa: PT012
        (directory / "a.json").write_text("half")
        raise error("stop")
    verify_manifest(target)
    assert (target / "a.json").read_text() == "first"
    assert only(tmp_path) == ["out"]
    with pytest.raises(error), atomic_directory(tmp_path / "never"):
        raise error("stop")
    assert only(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["block", "seal"])
def test_killed_writer_leaves_the_old_state(tmp_path: Path, where: str) -> None:
    """A process that dies in the block, or while it is sealed, leaves the old directory as the only visible one."""
    target = tmp_path / "out"
    make(target, "first")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), where], check=False)
    assert done.returncode == 9
    verify_manifest(target)
    assert (target / "a.json").read_text() == "first"
    assert [name for name in only(tmp_path) if not name.startswith(".")] == ["out"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    """By the next writer of that name, and what one that is still at work has is left alone; so is another name's."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), "block"], check=False)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out[1]"), "block"], check=False)
    assert len(only(tmp_path)) == 2
    with atomic_directory(tmp_path / "out") as first, atomic_directory(tmp_path / "out") as second:
        assert first.exists() and second.exists()
        assert len(only(tmp_path)) == 3  # these two, and what is left of out[1]
    make(tmp_path / "out[1]", "first")
    assert only(tmp_path) == ["out", "out[1]"]


def leave(parent: Path, name: str, host: str, kind: str = "partial", age: float = 0.0) -> Path:
    """What a killed writer of `name` on `host` leaves."""
    left = parent / f".{name}.{kind}-{host}-1-abcd1234"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    os.utime(left, (time.time() - age, time.time() - age))
    return left


def test_what_another_machine_works_on_is_left_alone(tmp_path: Path) -> None:
    """A writer clears what its own machine left, partial or just begun: locks of another may not be seen here (old code: it
    deleted the other's). A run directory is its holder's, whoever wrote there, but for what a process holds (old code: an
    export into it lost its directory)."""
    host = locks.host_name()
    there = leave(tmp_path, "out", "0" * 8)
    young = leave(tmp_path, "out", host, "begun")
    for gone in (leave(tmp_path, "out", host), leave(tmp_path, "out2", host, "begun", 100.0)):
        make(tmp_path / gone.name.split(".")[1], "first")
        assert not gone.exists()
    assert there.exists() and young.exists()
    with atomic_directory(tmp_path / "x") as held:
        leave(tmp_path / "checkpoints", "step-1", "0" * 8)
        with alone_in(tmp_path):
            assert held.exists() and not there.exists() and young.exists()
            assert only(tmp_path / "checkpoints") == []


def test_what_cannot_be_cleared_away_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something left by another user, or cleared by another process at the same moment (old code: a refusal, a traceback)."""
    leave(tmp_path, "out", locks.host_name())

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("shutil.rmtree", refuse)
    make(tmp_path / "out", "first")
    verify_manifest(tmp_path / "out")


def test_a_machine_has_one_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of its running kernel, else of the network; partial directories carry it."""
    name = locks.host_name()
    with atomic_directory(tmp_path / "out") as partial:
        assert partial.name.startswith(f".out.partial-{name}-")
    locks.host_name.cache_clear()
    monkeypatch.setattr(locks, "BOOT", tmp_path / "missing")
    monkeypatch.setattr("socket.gethostname", lambda: "somewhere")
    try:
        assert locks.host_name() == hashlib.sha256(b"somewhere").hexdigest()[:8] != name
    finally:
        locks.host_name.cache_clear()


@pytest.mark.parametrize("there", ["directory", "file", "link"])
def test_a_new_directory_replaces_nothing(tmp_path: Path, there: str) -> None:
    """What appears while the block runs stays, and is named (old code: it was deleted); an empty directory is replaced."""
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="out appeared meanwhile"), atomic_directory(target, new=True) as directory:  # noqa: PT012
        (directory / "a").write_text("ours")
        if there == "directory":
            make(target, "theirs")
        elif there == "file":
            target.write_text("theirs")
        else:
            target.symlink_to(tmp_path / "nowhere")
    assert only(tmp_path) == ["out"]
    if there == "directory":
        verify_manifest(target)
    target = tmp_path / "empty"
    target.mkdir()
    with atomic_directory(target, new=True) as directory:
        (directory / "a").write_text("ours")
    verify_manifest(target)


def test_an_atomic_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files move beside the target, the target's own before the others (old code: after them, so that a process killed in
    between left a card that was in the way of the next); an exception leaves none."""
    moved: list[str] = []
    move = storage._move_new
    monkeypatch.setattr(storage, "_move_new", lambda a, b: (moved.append(b.name), move(a, b)))
    with storage.atomic_file(tmp_path / "b.gguf") as directory:
        for name in ("b.gguf", "a.md", "c.md"):
            (directory / name).write_text(name)
    assert only(tmp_path) == ["a.md", "b.gguf", "c.md"]
    assert moved[0] == "b.gguf"
    with pytest.raises(OutputError), storage.atomic_file(tmp_path / "never") as directory:
        (directory / "never").write_text((directory / "not there").read_text())
    assert only(tmp_path) == ["a.md", "b.gguf", "c.md"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("name", ["b.gguf", "b.md"])
def test_an_atomic_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, links: bool) -> None:
    """A file that appears meanwhile stays (old code: it was overwritten), and what was moved before is taken back; with hard
    links, and on file systems that have none."""
    if not links:
        monkeypatch.setattr(os, "link", disk_full)
    with pytest.raises(OutputError, match=f"{name} appeared meanwhile"), storage.atomic_file(tmp_path / "b.gguf") as directory:  # noqa: PT012
        for file in ("b.gguf", "b.md"):
            (directory / file).write_text("ours")
        (tmp_path / name).write_text("theirs")
    assert only(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "theirs"
    (tmp_path / name).unlink()
    with storage.atomic_file(tmp_path / "b.gguf") as directory:
        (directory / "b.gguf").write_text("ours")
    assert only(tmp_path) == ["b.gguf"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_killed_writer_leaves_no_card_alone(tmp_path: Path, moves: int) -> None:
    """A process that dies before a move leaves nothing, or the whole file alone; never what goes with it, which was in the
    way of the next writer."""
    code = "import os, sys; from pathlib import Path; from trilobit import storage\n"
    code += "move, left = storage._move_new, [int(sys.argv[2])]\n"
    code += "def dies(a, b):\n    os._exit(9) if not left[0] else move(a, b)\n    left[0] -= 1\nstorage._move_new = dies\n"
    code += "with storage.atomic_file(Path(sys.argv[1])) as there:\n    [(there / n).write_text(n) for n in ('b.md', 'b.gguf')]"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b.gguf"), str(moves)], check=False)
    assert done.returncode == 9
    assert [name for name in only(tmp_path) if not name.startswith(".")] == ["b.gguf"][:moves]
    (tmp_path / "b.gguf").unlink(missing_ok=True)
    with storage.atomic_file(tmp_path / "b.gguf") as directory:
        (directory / "b.gguf").write_text("")
    assert only(tmp_path) == ["b.gguf"]


def test_a_new_file_must_be_new(tmp_path: Path) -> None:
    """Anything of its name is in the way: an empty directory (old code: it failed when all was written), a link to nothing."""
    storage.require_new_file(tmp_path / "a" / "b.gguf", "hint")
    (tmp_path / "c.gguf").mkdir()
    (tmp_path / "d.gguf").symlink_to(tmp_path / "nowhere")
    for name in ("c.gguf", "d.gguf"):
        with pytest.raises(OutputError, match=f"{name} exists already. hint"):
            storage.require_new_file(tmp_path / name, "hint")


def test_new_folders_are_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parents of folders that were made on the way are flushed, so that a power cut leaves what was reported."""
    seen: list[Path] = []
    fsync = storage._fsync
    monkeypatch.setattr(storage, "_fsync", lambda path: (seen.append(path), fsync(path)))
    make(tmp_path / "a" / "b" / "out", "first")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(seen)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one-step exchange of directories needs Linux")
def test_killed_between_the_renames_leaves_a_state(tmp_path: Path) -> None:
    """A process that dies between moving the old directory away and the new one in leaves one of them in place."""
    target = tmp_path / "out"
    make(target, "first")
    subprocess.run([sys.executable, "-c", KILLED, str(target), "swap"], check=False)
    verify_manifest(target)


def test_failed_rename_restores_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new directory cannot be moved in, the old one is moved back."""
    target = tmp_path / "out"
    make(target, "first")
    replace = os.replace

    def refuse(source: Path, destination: Path) -> None:
        if ".partial-" in Path(source).name:
            disk_full()
        replace(source, destination)

    monkeypatch.setattr("trilobit.storage.RENAME_EXCHANGE", 1 << 20)  # a kernel that cannot exchange: two renames
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):  # noqa: PT012
        patch.setattr(os, "replace", refuse)
        make(target, "second")
    verify_manifest(target)
    assert (target / "a.json").read_text() == "first"
    assert only(tmp_path) == ["out"]


@pytest.mark.parametrize("function", ["_sha256", "_fsync", "write_json"])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """ENOSPC at any step becomes an OutputError that names the target, and neither target nor leftovers exist."""
    monkeypatch.setattr(storage, function, disk_full)
    with pytest.raises(OutputError, match="out: No space left"):
        make(tmp_path / "out", "first")
    assert only(tmp_path) == []


def test_full_disk_under_write_json_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write_json on a full disk raises OutputError, keeps the old file, and leaves no temporary one."""
    write_json(tmp_path / "run.json", {"step": 1})
    monkeypatch.setattr(storage, "_fsync", disk_full)
    with pytest.raises(OutputError, match=r"run\.json: No space left"):
        write_json(tmp_path / "run.json", {"step": 2})
    assert json.loads((tmp_path / "run.json").read_text()) == {"step": 1}
    assert only(tmp_path) == ["run.json"]


def test_unwritable_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that is a file, or that the system does not let us write, is an OutputError before or at the write."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"), atomic_directory(tmp_path / "file" / "out"):
        pytest.fail("the block ran")
    with pytest.raises(OutputError, match="not a writable folder"):
        storage.require_new_directory(tmp_path / "file" / "a" / "out", "")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match="not a writable folder"):
        storage.require_new_directory(tmp_path / "a" / "out", "")


def test_new_directory_must_be_new(tmp_path: Path) -> None:
    """An empty or absent path is new; one that holds something, or a file, is refused with the caller's hint."""
    storage.require_new_directory(tmp_path / "a" / "b", "hint")
    storage.require_new_directory(tmp_path, "hint")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError, match="hint"):
            storage.require_new_directory(path, "hint")


def test_a_place_that_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    """A name that is too long (or a folder without permission) is an OutputError with the system's reason."""
    with pytest.raises(OutputError, match=r"cannot write .*: File name too long"):
        storage.require_new_directory(tmp_path / ("a" * 300) / "out", "")


def test_missing_space_is_refused(tmp_path: Path) -> None:
    """More bytes than the disk has free are refused, with the purpose; one byte is not."""
    storage.require_free_space(tmp_path / "a" / "b", 1, "a byte")
    with pytest.raises(OutputError, match="everything needs"):
        storage.require_free_space(tmp_path / "a" / "b", 2**62, "everything")


@pytest.mark.parametrize("name", ["a.json", "deep/b.bin"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    """Truncation, growth and absence are seen by both checks, a flipped bit by verify_manifest, which names it."""
    target = tmp_path / "out"
    make(target, "first")
    original = (target / name).read_bytes()
    for damaged in (original[:-1], original + b"x", b""):
        (target / name).write_bytes(damaged)
        assert not is_whole(target)
        with pytest.raises(ModelError, match=Path(name).name):
            verify_manifest(target)
    (target / name).write_bytes(bytes([original[0] ^ 1]) + original[1:])
    with pytest.raises(ModelError, match=Path(name).name):
        verify_manifest(target)
    (target / name).unlink()
    assert not is_whole(target)
    with pytest.raises(ModelError, match=Path(name).name):
        verify_manifest(target)
    (target / name).write_bytes(original)
    verify_manifest(target)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a.json": 3}}', '{"files": {"a.json": {}}}']
)
def test_damaged_manifest_is_no_manifest(tmp_path: Path, text: str) -> None:
    """A manifest that is cut short or of another shape is a ModelError, never another exception or a pass."""
    target = tmp_path / "out"
    make(target, "first")
    (target / MANIFEST).write_text(text)
    assert not is_whole(target)
    with pytest.raises(ModelError):
        verify_manifest(target)
    (target / MANIFEST).unlink()
    assert not is_whole(target)
    with pytest.raises(ModelError, match="not completely written"):
        verify_manifest(target)
