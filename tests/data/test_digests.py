"""The set of digests that spills to disk: the same answers, in bounded memory, without debris."""

import errno
import random
import subprocess
import sys

import pytest

from flexolmo_jax.data import digests as module
from flexolmo_jax.data.digests import open_digests
from flexolmo_jax.data.documents import digest_of
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.errors import UserError
from tests.data.test_prepare import T, files_of


def many(count: int, different: int) -> list[bytes]:
    draw = random.Random(3)
    return [digest_of(str(draw.randrange(different))) for _ in range(count)]


@pytest.mark.parametrize("in_memory", [1, 7, 10_000])
def test_a_digest_is_new_once_however_many_are_in_memory(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(module, "IN_MEMORY", in_memory)
    seen: set[bytes] = set()
    with open_digests(tmp_path) as digests:
        for digest in many(3000, 1000):
            assert digests.add(digest) == (digest not in seen)
            seen.add(digest)


def test_no_more_digests_are_in_memory_than_stated(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 50)
    with open_digests(tmp_path) as digests:
        for digest in many(3000, 3000):
            digests.add(digest)
            assert len(digests._recent) < 50
        assert list(tmp_path.iterdir()) == []  # the table has no name that a kill could leave


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 1000)
    with open_digests(tmp_path) as digests, pytest.raises(OSError) as caught:
        for number, digest in enumerate(many(100_000, 100_000)):
            if number == 2000 and digests._table:
                digests._table.execute("PRAGMA max_page_count = 10")
            digests.add(digest)
    assert caught.value.errno == errno.ENOSPC


def test_prepared_data_do_not_depend_on_where_the_digests_are(
    tmp_path, write_jsonl, made_up_documents, tokenizer, monkeypatch
):
    documents = made_up_documents(300, seed=4)
    corpus = write_jsonl(tmp_path / "a.jsonl", [*documents, *documents[::3], "", *documents[::7]])
    prepare([corpus], tokenizer, T, tmp_path / "set" / "out")
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    index = prepare([corpus], tokenizer, T, tmp_path / "table" / "out")
    assert index.duplicates_removed == 100 + 43
    assert files_of(tmp_path / "set" / "out") == files_of(tmp_path / "table" / "out")
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["out"]


def test_a_disk_that_is_full_of_digests_leaves_nothing(
    tmp_path, write_jsonl, made_up_documents, tokenizer, monkeypatch
):
    corpus = write_jsonl(tmp_path / "a.jsonl", made_up_documents(100, seed=4))

    def fail(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "IN_MEMORY", 10)
    monkeypatch.setattr(module.Digests, "_spill", fail)
    with pytest.raises(UserError, match="no space left"):
        prepare([corpus], tokenizer, T, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_killed_process_leaves_no_table(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from flexolmo_jax.data import digests\n"
        "digests.IN_MEMORY = 10\n"
        "with digests.open_digests(pathlib.Path(sys.argv[1])) as table:\n"
        "    for number in range(100): table.add(os.urandom(32))\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert ended.returncode == -9
    assert list(tmp_path.iterdir()) == []
