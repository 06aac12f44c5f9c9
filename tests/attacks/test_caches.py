"""What is remembered of what was verified, and what a store remembers of its objects. The promise:
nothing that a stranger wrote speaks for itself, and what was stopped goes on."""

import os
import shutil

import pytest

from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.coordinator.objects import OBJECT_FILE
from flexolmo_jax.coordinator.store import Store
from flexolmo_jax.storage import files, verified


@pytest.mark.parametrize("home", ["", "here"])
def test_nothing_is_remembered_below_the_working_directory(tmp_path, monkeypatch, home):
    """What is verified cannot speak for itself: a relative cache lies wherever a command is given,
    and that may be in what a stranger sent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "anchor").mkdir()
    calls = []
    for _ in range(2):
        verified.once(tmp_path / "anchor", "claim", lambda: calls.append(1))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "here").exists()
    assert len(calls) == (2 if home else 1)


def test_a_cache_that_may_not_be_searched_is_none(tmp_path, monkeypatch):
    """A correct result: a folder without the right to search it stopped every command."""
    monkeypatch.setattr(verified, "_folder", lambda: tmp_path / ("n" * 300))
    calls = []
    verified.once(tmp_path, "claim", lambda: calls.append(1))
    assert calls == [1]


def test_a_store_outlives_a_kill_while_it_writes_a_record(anchor, contributions, tmp_path):
    """What was stopped goes on: a copied store is read again and its inventories are written
    anew. A kill there, or another command at the same moment, made its objects damaged."""
    law = [contributions["law"]]
    merge(anchor, law, tmp_path / "model", store_path=tmp_path / "first")
    store = shutil.copytree(tmp_path / "first", tmp_path / "store")

    class Killed(BaseException):
        pass

    def kill(operation, path):
        if operation == "rename" and path.name == OBJECT_FILE:
            shutil.copy(path, path.with_name(f".{OBJECT_FILE}.{os.getpid()}1.tmp"))
            raise Killed

    files.observer = kill
    try:
        with pytest.raises(Killed):
            merge(anchor, law, tmp_path / "model-2", store_path=store)
    finally:
        files.observer = None
    merge(anchor, law, tmp_path / "model-3", store_path=store)
    assert Store.existing(store).verify() == 2
    shutil.rmtree(tmp_path / "model-3")
    told = Store.existing(store).gc()
    assert "left_alone" not in told
