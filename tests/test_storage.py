"""Directories on disk are whole or absent, whatever happens to the writer."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trilobit import storage
from trilobit.errors import ModelError, OutputError
from trilobit.storage import MANIFEST, alone_in, atomic_directory, is_whole, verify_manifest, write_json

KILLED = """
import os, sys
from pathlib import Path
from trilobit import storage
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
    code = "import os, sys; from pathlib import Path; from trilobit.storage import alone_in\n"
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


def test_an_atomic_file_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files move beside the target, the target's own after the others; an exception leaves none."""
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with storage.atomic_file(tmp_path / "b.gguf") as directory:
        for name in ("b.gguf", "a.md", "c.md"):
            (directory / name).write_text(name)
    assert only(tmp_path) == ["a.md", "b.gguf", "c.md"]
    assert moved[-1] == "b.gguf"
    with pytest.raises(OutputError), storage.atomic_file(tmp_path / "never") as directory:
        (directory / "never").write_text((directory / "not there").read_text())
    assert only(tmp_path) == ["a.md", "b.gguf", "c.md"]


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
