"""What was verified once is read again where anything may have changed, and not where nothing
has."""

import os
from pathlib import Path

import pytest

from flexolmo_jax.storage import verified


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file in a directory of its own that was verified once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "it" / "folder").mkdir(parents=True)
    file = tmp_path / "it" / "folder" / "file"
    file.write_bytes(b"right")
    assert is_read(tmp_path / "it") and not is_read(tmp_path / "it")
    return file


def is_read(directory: Path, claim: str = "model 1") -> bool:
    called = []
    verified.once(directory, claim, lambda: called.append(1))
    return bool(called)


def changed_keeping_its_time(file: Path) -> None:
    status = file.stat()
    file.write_bytes(b"wrong")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_is_changed_and_given_back_its_old_time_is_read_again(file, tmp_path):
    changed_keeping_its_time(file)
    assert is_read(tmp_path / "it") and not is_read(tmp_path / "it")


def test_a_file_of_several_names_is_read_again_when_it_changes_and_not_when_it_gets_one_more(
    file, tmp_path
):
    """Models of one store share files: composing another one gives them a name, and changes no byte
    of these."""
    os.link(file, tmp_path / "second")
    is_read(tmp_path / "it")
    os.link(file, tmp_path / "third")
    assert not is_read(tmp_path / "it")
    os.utime(file, ns=(1, 1))
    assert is_read(tmp_path / "it")


@pytest.mark.parametrize(
    "change",
    ["another size", "another file", "a mode", "one more", "one less", "another name", "a link"],
)
def test_whatever_changes_is_read_again(file, tmp_path, change):
    status = file.stat()
    os.link(file, tmp_path / "second")  # so that the time of change says nothing
    is_read(tmp_path / "it")
    if change == "another size":
        file.write_bytes(b"longer than before")
    elif change == "another file":
        file.unlink()
        file.write_bytes(b"right")
        os.link(file, tmp_path / "third")
    elif change == "a mode":
        file.chmod(0o600 if status.st_mode & 0o777 != 0o600 else 0o644)
    elif change == "one more":
        (file.parent / "more").touch()
    elif change == "one less":
        file.unlink()
    elif change == "another name":
        file.rename(file.with_name("other"))
    else:
        (file.parent / "link").symlink_to(tmp_path)
    for each in (file, file.with_name("other")):
        if each.exists():
            os.utime(each, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert is_read(tmp_path / "it") and not is_read(tmp_path / "it")


def test_a_passed_check_counts_for_its_own_claim_only(file, tmp_path):
    assert (
        is_read(tmp_path / "it", "model 2")
        and not is_read(tmp_path / "it", "model 2")
        and not is_read(tmp_path / "it")
    )


def test_what_somebody_else_could_have_remembered_counts_for_nothing(file, tmp_path, monkeypatch):
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)
        assert is_read(tmp_path / "it") and is_read(tmp_path / "it")
    assert not is_read(tmp_path / "it")
    for mode in (0o720, 0o702):
        (tmp_path / "cache" / "flexolmo-jax" / "verified").chmod(mode)
        assert is_read(tmp_path / "it")


def test_a_check_that_fails_is_not_remembered(file, tmp_path):
    def fails() -> None:
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            verified.once(tmp_path / "it", "another", fails)
