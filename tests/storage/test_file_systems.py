"""File systems that lack something: what is written there is whole, or refused in one line.

No file system here lacks anything, so the system's calls are made to say what others say.
"""

import errno
import fcntl
import os
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import new_directory, write_text, write_together
from flexolmo_jax.storage.locks import alone
from flexolmo_jax.storage.outputs import check_new, check_new_file
from flexolmo_jax.storage.placing import place
from flexolmo_jax.storage.weights import Reader, save

LACKING = {
    "locks": (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL),
    "links": (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS),
    "syncing of folders": (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF),
    "modes": (errno.EPERM, errno.EOPNOTSUPP),
}


@pytest.fixture(params=[(what, code) for what, codes in LACKING.items() for code in codes])
def lacking(request, monkeypatch) -> str:
    what, code = request.param

    def refuse(*_, **__) -> None:
        raise OSError(code, os.strerror(code))

    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()
        fsync(descriptor)

    if what == "locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    elif what == "links":
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "symlink", refuse)
    elif what == "modes":
        monkeypatch.setattr(os, "chmod", refuse)
        monkeypatch.setattr(Path, "chmod", refuse)
    else:
        monkeypatch.setattr(os, "fsync", sync)
    return what


def test_what_a_file_system_lacks_is_done_without(lacking, tmp_path):
    with new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("a")
        save(directory / "weights", {"w": np.ones((2, 2), np.float32)}, {"w": ("embed", "ffn")})
    assert (Reader(tmp_path / "out" / "weights").read("w", (slice(2), slice(2))) == 1).all()
    write_text(tmp_path / "out" / "b", "b")
    place(tmp_path / "out" / "b", tmp_path / "out" / "c")
    assert (tmp_path / "out" / "c").read_text() == "b"
    write_together({tmp_path / "k.pub": (b"public", 0o644), tmp_path / "k": (b"own", 0o600)})
    assert (tmp_path / "k").read_bytes() == b"own"
    with pytest.raises(UserError, match="nothing was written"):
        write_together({tmp_path / "n": (b"new", 0o644), tmp_path / "k": (b"other", 0o600)})
    assert (tmp_path / "k").read_bytes() == b"own" and not (tmp_path / "n").exists()
    with alone(tmp_path / "k"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "k.pub", "out"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_folder_that_fails_to_sync_for_another_reason_is_not_there(code, tmp_path, monkeypatch):
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises((OSError, UserError)), new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("a")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    rename = os.rename

    def refuse(source, target):  # as for the place of a mount
        if source == out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="busy; give a new directory in it"), new_directory(out):
        raise AssertionError("the work has begun")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_mounted_folder_is_refused_before_the_work(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["mount", "--bind", str(out), str(out)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(UserError, match="busy"), new_directory(out):
            raise AssertionError("the work has begun")
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_an_empty_folder_that_is_there_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as directory:
        assert (tmp_path / "out").is_dir()
        (directory / "a").write_text("a")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        for check in (check_new, check_new_file):
            with pytest.raises(UserError, match="file is not a folder"):
                check(out)
    access = os.access  # root may write wherever the file system may
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    for check in (check_new, check_new_file):
        with pytest.raises(UserError, match=f"{tmp_path} may not be written to"):
            check(tmp_path / "new" / "x")


def test_a_full_disk_is_told_with_the_path(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flexolmo_jax.config.load_config", full)
    assert main(["train", "run.yaml", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"flexolmo: no space left on the disk while writing {tmp_path}/run; ")
