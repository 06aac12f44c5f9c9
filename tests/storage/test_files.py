"""Files and directories that are whole or not there."""

import errno
import fcntl
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage import files
from flexolmo_jax.storage.files import (
    MARK,
    abandoned,
    clear,
    discard,
    new_directory,
    remove_abandoned,
    write_text,
    write_together,
)
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.placing import place
from tests.recorder import Recorder


def test_a_new_directory_is_there_at_the_end_or_not_at_all(tmp_path):
    with new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "a"
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "other") as directory:
        (directory / "a").write_text("a")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="is not empty"), new_directory(tmp_path / "out"):
        pass


def test_only_what_dead_processes_left_is_abandoned(tmp_path):
    program = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from flexolmo_jax.storage.files import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'a').write_text('a')\n"
        "    print('ready', flush=True); sys.stdin.readline()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out[1]")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ,
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    assert abandoned(tmp_path) == []
    process.communicate(b"\n")
    (left,) = abandoned(tmp_path)
    assert abandoned(tmp_path, "out[1]") == [left] and abandoned(tmp_path, "out1") == []
    assert (left / "content" / "a").read_text() == "a"
    clear(tmp_path / "out[1]")
    assert list(tmp_path.iterdir()) == []


def test_what_only_has_the_name_of_a_leftover_is_nobodys_to_remove(tmp_path):
    for name in (".out.backup.tmp", ".out.0123abcd.tmp", ".out.12345678.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / ".out.12345678.tmp" / ".unfinished").write_text("mine")
    (tmp_path / ".out.87654321.tmp").write_text("a file")
    (tmp_path / ".out.abcdef01.tmp").symlink_to(tmp_path / ".out.backup.tmp")
    before = sorted(tmp_path.rglob("*"))
    assert abandoned(tmp_path) == [] and abandoned(tmp_path, "out") == []
    clear(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / ".out.12345678.tmp" / ".unfinished").write_bytes(MARK)
    (left,) = abandoned(tmp_path)
    # whoever put the thesis there after all keeps it: only what was being written goes
    remove_abandoned(left)
    assert (tmp_path / ".out.12345678.tmp" / "thesis.txt").read_text() == "years of work"


def test_nothing_but_the_store_writes_inside_a_store(tmp_path):
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(UserError, match="lies inside the store"):
        check_new(tmp_path / "objects" / "model")


def test_a_file_system_without_locks_is_written_to_and_nothing_on_it_counts_as_abandoned(
    tmp_path, monkeypatch
):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_directory(tmp_path / "out"):
        assert abandoned(tmp_path) == []
    assert (tmp_path / "out").is_dir()
    with pytest.raises(OSError), locked(tmp_path, wait=False):
        pass


def test_the_first_way_that_works_is_taken(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    # it could be changed through its other name
    assert place(tmp_path / "a", tmp_path / "sub" / "copied") != "link"
    with pytest.raises(UserError, match="cannot make"):
        place(tmp_path / "a", tmp_path / "linked", ("link",))
    (tmp_path / "a").chmod(0o444)
    assert (tmp_path / "sub" / "copied").stat().st_mode & 0o777 == 0o444
    assert place(tmp_path / "a", tmp_path / "sub" / "b") == "link"
    assert (tmp_path / "sub" / "b").stat().st_ino == (tmp_path / "a").stat().st_ino
    cloned = []

    # ext4 has none; what the call does is the kernel's business
    def clone(descriptor, request, source):
        cloned.append(request)
        os.write(descriptor.fileno(), os.pread(source, 100, 0))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "ioctl", clone)
        assert place(tmp_path / "a", tmp_path / "c", ("reflink", "copy")) == "reflink"
    assert cloned == [0x40049409] and (tmp_path / "c").read_text() == "a"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "ioctl", full)
        with pytest.raises(OSError, match="No space"):  # no reason to try another way
            place(tmp_path / "a", tmp_path / "d", ("reflink", "copy"))
    assert not (tmp_path / "d").exists()
    assert place(tmp_path / "a", tmp_path / "d", ("copy",)) == "copy"


def test_a_directory_that_is_removed_goes_in_one_step(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    seen: list[tuple[str, Path]] = []
    monkeypatch.setattr(files, "observer", lambda operation, path: seen.append((operation, path)))
    discard(tmp_path / "a")
    assert seen == [("remove", tmp_path / "a")] and list(tmp_path.iterdir()) == []


def test_a_new_directory_is_on_the_disk_before_it_is_seen_and_its_name_before_anything_goes_on(
    tmp_path, monkeypatch
):
    """A power cut leaves all of it or nothing: no name of a file whose bytes were still in
    memory."""
    recorder = Recorder(monkeypatch)
    with new_directory(tmp_path / "out") as directory:
        (directory / "folder" / "empty").mkdir(parents=True)
        (directory / "a").write_text("a")
        (directory / "folder" / "b").write_text("b")
    assert recorder.renamed == [tmp_path / "out"]
    recorder.expect_durable(tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*"))) == 4


def test_a_replaced_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    write_text(tmp_path / "a", "a")
    recorder.expect_durable(tmp_path / "a")
    write_text(tmp_path / "a", "b")
    recorder.expect_durable(tmp_path / "a")


def test_files_written_together_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    write_together({tmp_path / "a": (b"a", 0o600), tmp_path / "b": (b"b", 0o644)})
    for name in "ab":
        recorder.expect_durable(tmp_path / name)


def test_what_lies_where_a_key_is_first_written_is_not_written_to(tmp_path, monkeypatch):
    """A link there would have taken the key to another place, readable by whoever reads that."""
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    (tmp_path / ".key.00000000.tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="nothing was written"):
        write_together({tmp_path / "key": (b"secret", 0o600)})
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "key").exists()


@pytest.mark.parametrize("owner", ["mine", "somebody else's"])
def test_a_file_of_somebody_else_is_not_linked(tmp_path, monkeypatch, owner):
    """Its owner could make it writable, and change it under all of its names."""
    (tmp_path / "a").write_text("a")
    (tmp_path / "a").chmod(0o444)
    if owner != "mine":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert (place(tmp_path / "a", tmp_path / "b", ("link", "copy")) == "link") == (owner == "mine")
