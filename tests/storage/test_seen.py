"""Digests of files that are remembered: which are read again."""

import os
import time
from pathlib import Path

import pytest

from flexolmo_jax.data.records import sha256_of
from flexolmo_jax.storage.seen import GRANULARITY, digests_of


class Reader:
    """Digests of a folder's files, and which were read for them."""

    def __init__(self, cache: Path):
        self.cache, self.read = cache, []

    def __call__(self, place: Path, *files: Path) -> list[str]:
        self.read = []
        return digests_of(place, files, self.cache, self._digest)

    def _digest(self, file: Path) -> str:
        self.read.append(file.name)
        return sha256_of(file)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two files, last written an hour ago."""
    (tmp_path / "docs").mkdir()
    made = [tmp_path / "docs" / name for name in ("a", "b")]
    for file in made:
        write(file, file.name)
    return made


def write(file: Path, text: str, *, ago: float = 3600) -> None:
    file.write_text(text)
    then = time.time_ns() - int(ago * 1e9)
    os.utime(file, ns=(then, then))


def test_unchanged_files_are_read_once(files, tmp_path):
    digests = Reader(tmp_path / "cache")
    first = digests(tmp_path / "docs", *files)
    assert digests.read == ["a", "b"] and first == [sha256_of(file) for file in files]
    assert digests(tmp_path / "docs", *files) == first and digests.read == []


def test_only_the_files_that_changed_are_read_again(files, tmp_path):
    digests, (a, b) = Reader(tmp_path / "cache"), files
    digests(tmp_path / "docs", a, b)
    write(b, "another text")
    found = digests(tmp_path / "docs", a, b)
    assert digests.read == ["b"] and found == [sha256_of(a), sha256_of(b)]


@pytest.mark.parametrize("what", ["size", "time", "inode"])
def test_a_file_of_another_size_time_or_inode_is_read_again(what, files, tmp_path):
    digests, (a, _) = Reader(tmp_path / "cache"), files
    digests(tmp_path / "docs", a)
    status = a.stat()
    if what == "inode":
        (tmp_path / "new").write_text("c")
        os.replace(tmp_path / "new", a)
    else:
        a.write_text("cc" if what == "size" else "c")
    later = 1 if what == "time" else 0
    os.utime(a, ns=(status.st_atime_ns, status.st_mtime_ns + later))
    assert digests(tmp_path / "docs", a) == [sha256_of(a)] and digests.read == ["a"]


def test_a_file_that_was_written_just_before_is_read_again(files, tmp_path):
    digests, (a, _) = Reader(tmp_path / "cache"), files
    write(a, "one", ago=0)
    times = a.stat().st_mtime_ns
    digests(tmp_path / "docs", a)
    a.write_text("two")
    os.utime(a, ns=(times, times))  # as by a file system of coarse times
    assert digests(tmp_path / "docs", a) == [sha256_of(a)] and digests.read == ["a"]
    write(a, "two", ago=GRANULARITY / 1e9 + 1)
    digests(tmp_path / "docs", a)
    digests(tmp_path / "docs", a)
    assert digests.read == []


def test_a_file_that_changes_while_it_is_read_is_read_again(files, tmp_path):
    a, cache = files[0], tmp_path / "cache"

    def changing(file: Path) -> str:
        digest = sha256_of(file)
        write(file, "behind its reader's back", ago=1800)
        return digest

    digests_of(tmp_path / "docs", [a], cache, changing)
    assert digests_of(tmp_path / "docs", [a], cache, sha256_of) == [sha256_of(a)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": "not a digest"}'])
def test_what_is_remembered_badly_is_forgotten(content, files, tmp_path):
    digests = Reader(tmp_path / "cache")
    digests(tmp_path / "docs", *files)
    (record,) = (tmp_path / "cache" / "seen").iterdir()
    record.write_text(content)
    assert digests(tmp_path / "docs", *files) == [sha256_of(file) for file in files]
    assert digests.read == ["a", "b"]


def test_a_cache_that_cannot_be_written_remembers_nothing(files, tmp_path):
    (tmp_path / "file").write_text("")
    digests = Reader(tmp_path / "file")
    for _ in range(2):
        assert digests(tmp_path / "docs", *files) == [sha256_of(file) for file in files]
        assert digests.read == ["a", "b"]


def test_objects_are_read_again_where_their_generation_is_another(bucket, tmp_path):
    digests, files = Reader(tmp_path / "cache"), [bucket / "d" / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(b"one")
    first = digests(bucket / "d", *files)
    assert digests.read == ["a", "b"]
    assert digests(bucket / "d", *files) == first and digests.read == []
    files[0].write_bytes(b"two")
    assert digests(bucket / "d", *files)[0] != first[0] and digests.read == ["a"]
    assert digests(files[1], files[1]) == first[1:] and digests.read == ["b"]
    assert digests(files[1], files[1]) == first[1:] and digests.read == []
