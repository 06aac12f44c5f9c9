"""Attacks by whoever made the store, or the folders around the cache. The promise: what is verified
is what runs, and no directory speaks for itself."""

import dataclasses
import os
from pathlib import Path

import pytest

from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.coordinator.objects import Inventory, content_of
from flexolmo_jax.coordinator.store import Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage import verified


@pytest.fixture
def store(anchor, contributions, tmp_path) -> Path:
    """That another user merged `law` with."""
    merge(anchor, [contributions["law"]], tmp_path / "theirs", store_path=tmp_path / "store")
    return tmp_path / "store"


def expert_in(store: Path) -> tuple[Path, Inventory]:
    objects = [path for path in (store / "objects").iterdir() if path.name[0] != "."]
    return next((o, Inventory.read(o)) for o in objects if Inventory.read(o).kind == "expert")


def test_an_inventory_does_not_vouch_for_itself(anchor, contributions, store, tmp_path):
    """Something verified is what runs: a store that others made may hold other bytes under an
    object's name, with an inventory of their very sizes, inodes and times. They were merged unread,
    and the model counted as verified."""
    path, inventory = expert_in(store)
    name = next(n for n in sorted(content_of(path)) if "experts.gate/c/" in n)
    forged = bytearray((path / name).read_bytes())
    forged[10] ^= 1
    (path / "forged").write_bytes(forged)
    os.replace(path / "forged", path / name)
    inventory.of_files_in(path).write(path)
    with pytest.raises(UserError, match="is damaged"):
        merge(anchor, [contributions["law"]], tmp_path / "model", store_path=store)
    assert not (tmp_path / "model").exists()


def test_an_objects_sketch_is_that_of_its_weights(anchor, contributions, store, tmp_path):
    """A claim is believed with cause only: near copies of who has left are found by the sketch that
    an inventory holds, and nobody compared it with the weights. Models of it did not verify."""
    path, inventory = expert_in(store)
    other = next(o for o in (store / "objects").iterdir() if o != path)
    dataclasses.replace(inventory, sketch=Inventory.read(other).sketch).write(path)
    with pytest.raises(UserError, match="sketch"):
        verify(store)
    with pytest.raises(UserError, match="sketch"):
        merge(anchor, [contributions["law"]], tmp_path / "model", store_path=store)


def test_another_users_store_is_read_once(
    anchor, contributions, store, tmp_path, monkeypatch, capsys
):
    """A correct result, at no lasting cost: what this user has not checked is read once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    for number, is_read in enumerate([True, False]):
        merge(anchor, [contributions["law"]], tmp_path / f"m{number}", store_path=store)
        assert ("it is read again" in capsys.readouterr().err) == is_read
    assert Store.existing(store).verify() == 2


def test_nobody_links_a_cache_into_the_place_of_the_users(tmp_path, monkeypatch):
    """No directory speaks for itself: who may write to the folder above the cache links any folder
    of the user's there, such as one that was unpacked, and so chose what counts as verified."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "unpacked"))
    (tmp_path / "anchor").mkdir()
    verified.once(tmp_path / "anchor", "claim", lambda: None)
    cache = tmp_path / "cache" / "flexolmo-jax"
    cache.mkdir(parents=True)
    (cache / "verified").symlink_to(tmp_path / "unpacked" / "flexolmo-jax" / "verified")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []
    verified.once(tmp_path / "anchor", "claim", lambda: calls.append(1))
    assert calls == [1]


def test_a_cache_is_ones_own_whatever_the_umask(tmp_path, monkeypatch):
    """No directory speaks for itself: under umask 000 everybody could replace the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        for _ in range(2):
            verified.once(tmp_path, "claim", lambda: None)
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "flexolmo-jax").stat().st_mode & 0o777 == 0o700
