"""Attacks on a store's objects and on the files that models share with it. The promise: none is
merged changed, and `gc` removes none that is needed or not the store's own."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import append, merge, opt_out, replace
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import TENSORS
from flexolmo_jax.loaded import load
from flexolmo_jax.storage import files
from tests.attacks.test_stores import everything
from tests.faults.kill_everywhere import contents


def test_gc_leaves_what_the_store_has_no_record_of(anchor, contributions, tmp_path):
    """Objects with a foreign file in them, folders named like objects, files named like leftovers
    beside a model."""
    model = merge(anchor, [contributions["code"]], tmp_path / "model").path
    store, objects = Store.existing(tmp_path / STORE), tmp_path / STORE / "objects"
    mine = [
        tmp_path / ".model.backup.tmp",
        tmp_path / ".model.0123abcd.tmp",
        objects / ("e" * 64),
        objects / "notes",
    ]
    for path in mine:
        path.mkdir()
        (path / "thesis.txt").write_text("years of work")
    shutil.rmtree(model)
    unneeded = next(path for path in sorted(objects.iterdir()) if (path / "object.json").exists())
    (unneeded / "weights" / "thesis.txt").write_text("years of work")
    told = store.gc()
    assert len(told["removed"]) == 1 and unneeded.name in told["left_alone"]
    for path in (*mine, unneeded / "weights"):
        assert (path / "thesis.txt").read_text() == "years of work"


def test_what_comes_from_outside_shares_no_file_with_store_or_models(
    anchor, contributions, tmp_path
):
    """A downloaded anchor's files stay writable: a plain `cp` over one of them must not change any
    model."""
    downloaded = Path(shutil.copytree(anchor, tmp_path / "anchor"))
    for file in downloaded.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
    model = merge(downloaded, [contributions["code"]], tmp_path / "model").path
    outside = {file.stat().st_ino for file in downloaded.rglob("*") if file.is_file()}
    inside = [
        file for folder in (model, tmp_path / STORE) for file in folder.rglob("*") if file.is_file()
    ]
    assert not outside & {file.stat().st_ino for file in inside}
    shards = [file for file in inside if "/c/" in str(file)]
    assert shards and all(stat.S_IMODE(file.stat().st_mode) == 0o444 for file in shards)
    before = contents(model)
    shard = next(
        file for file in sorted(downloaded.rglob("weights/experts.up/c/**/*")) if file.is_file()
    )
    shard.write_bytes(bytes(shard.stat().st_size))
    assert (
        contents(model) == before
        and verify(model)["verified"]
        and verify(tmp_path / STORE)["verified"]
    )
    with pytest.raises(UserError, match=r"bytes of|cannot be read"):
        merge(downloaded, [contributions["law"]], tmp_path / "again")


def test_a_models_files_are_linked_only_while_nobody_can_write_to_them(model, tmp_path):
    """A model as downloaded is writable: what is made of it has files of its own."""
    downloaded = Path(shutil.copytree(model, tmp_path / "model"))
    for file in downloaded.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
    without = opt_out(downloaded, ["law"], tmp_path / "without").path
    inodes = [
        {file.stat().st_ino for file in each.rglob("*") if file.is_file()}
        for each in (downloaded, without)
    ]
    assert not inodes[0] & inodes[1]


def test_bytes_that_change_under_a_shared_name_are_found_at_the_next_use(
    anchor, contributions, tmp_path
):
    """Root may write to a read-only file: siblings share it, and the first load of each says so."""
    model = merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "model").path
    sibling = opt_out(model, ["law"], tmp_path / "sibling").path
    load(sibling)
    shard = next(
        file for file in sorted(model.glob("weights/experts.up/c/0/1/**/*")) if file.is_file()
    )
    content = bytearray(shard.read_bytes())
    content[8] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    out = tmp_path / "out"
    for use in (
        lambda: load(sibling),
        lambda: load(model),
        lambda: opt_out(model, ["law"], out),
        lambda: append(sibling, contributions["law"], out),
        lambda: replace(model, contributions["law"], out),
        lambda: merge(anchor, [contributions["code"]], out),
    ):
        with pytest.raises(UserError, match=r"bytes of|cannot be read|is damaged"):
            use()
        assert not (tmp_path / "out").exists()


def test_an_object_that_was_replaced_is_not_merged(anchor, contributions, tmp_path):
    """By bytes of the same size with valid checksums: another expert's file."""
    merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "model", ways=("copy",))
    by_up: dict[bytes, Path] = {}
    for file in sorted((tmp_path / STORE / "objects").glob("*/weights/experts.up/c/0/0/**/*")):
        if file.is_file():
            by_up[file.read_bytes()] = file
    (first, one), (_, other) = list(by_up.items())[:2]
    other.unlink()
    other.write_bytes(first)
    for names in (["code"], ["law"], ["code", "law"]):
        try:
            made = merge(
                anchor, [contributions[name] for name in names], tmp_path / "-".join(names)
            ).path
        except UserError as error:
            assert "is damaged" in str(error)
        else:
            assert verify(made)["verified"]
    assert one.exists()
    with pytest.raises(UserError, match="is damaged"):
        verify(tmp_path / STORE)


def test_a_store_that_was_copied_is_read_again_and_used(anchor, contributions, tmp_path, capsys):
    merge(anchor, [contributions["code"]], tmp_path / "model")
    copy = Path(shutil.copytree(tmp_path / STORE, tmp_path / "copy"))
    capsys.readouterr()
    merge(anchor, [contributions["code"]], tmp_path / "again", store_path=copy)
    assert "is read again" in capsys.readouterr().err
    merge(anchor, [contributions["code"]], tmp_path / "once more", store_path=copy)
    assert "is read again" not in capsys.readouterr().err


@pytest.mark.parametrize("admission", [True, False])
def test_a_contribution_that_was_damaged_after_it_was_taken_in_is_not_merged(
    anchor, contributions, tmp_path, admission
):
    """What lies in the store is whole; what was given is not what its manifest says."""
    copy = Path(shutil.copytree(contributions["code"], tmp_path / "code"))
    merge(anchor, [copy], tmp_path / "model")
    content = bytearray((copy / TENSORS).read_bytes())
    content[-3] ^= 1
    (copy / TENSORS).write_bytes(content)
    with pytest.raises(UserError, match="bytes of"):
        merge(anchor, [copy], tmp_path / "again", gate=Gate(admission=admission))


GC = """
import sys
from pathlib import Path
from flexolmo_jax.coordinator.store import Store
store = Store.existing(Path(sys.argv[1]))
print("begun", flush=True)
print(len(store.gc()["removed"]), flush=True)
"""


def test_gc_waits_for_a_merge_of_another_process(anchor, contributions, tmp_path):
    """Promise: nothing of the user's is removed. An object that was taken in is needed before the
    model that needs it is there."""
    merge(anchor, [], tmp_path / "first")
    waiting: list[subprocess.Popen[bytes]] = []

    def collect_meanwhile(operation: str, path: Path) -> None:
        if operation == "link" and "model" in str(path) and not waiting:
            waiting.append(
                subprocess.Popen(
                    [sys.executable, "-c", GC, str(tmp_path / STORE)],
                    stdout=subprocess.PIPE,
                    env=os.environ,
                )
            )
            assert waiting[0].stdout and waiting[0].stdout.readline() == b"begun\n"
            with pytest.raises(subprocess.TimeoutExpired):
                waiting[0].wait(1)

    files.observer = collect_meanwhile
    try:
        model = merge(anchor, [contributions["code"]], tmp_path / "model").path
    finally:
        files.observer = None
    (gc,) = waiting
    assert gc.communicate()[0] == b"0\n" and gc.returncode == 0
    assert verify(model)["verified"] and verify(tmp_path / STORE)["objects"] == 2


def test_an_object_under_the_name_of_another_is_not_merged(anchor, contributions, tmp_path):
    """Promise: what is verified is what runs. Both are whole, and each is what the other's name
    says."""
    merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "model", ways=("copy",))
    objects = [
        path
        for path in (tmp_path / STORE / "objects").iterdir()
        if '"kind": "expert"' in (path / "object.json").read_text()
    ]
    one, other = objects
    one.rename(tmp_path / "away")
    other.rename(one)
    (tmp_path / "away").rename(other)
    for use in (
        lambda: verify(tmp_path / STORE),
        lambda: merge(anchor, [contributions["code"]], tmp_path / "again"),
    ):
        with pytest.raises(UserError, match="its inventory is that of another object"):
            use()
    assert not (tmp_path / "again").exists()


def test_gc_forgets_models_that_are_gone_and_removes_no_file_that_only_looks_like_an_entry(
    anchor, contributions, tmp_path
):
    """Promise: nothing of the user's is removed. What a killed process left of an entry has one
    form of name, and goes."""
    model, other = (
        merge(anchor, [contributions["code"]], tmp_path / name).path for name in ("model", "other")
    )
    entries, left = tmp_path / STORE / "models", f".{'0' * 16}.json.123.tmp"
    for name in (left, ".notes.json.tmp", "notes.txt", f"{'0' * 16}.json.bak"):
        (entries / name).write_text("mine")
    shutil.rmtree(other)
    assert Store.existing(tmp_path / STORE).gc()["removed"] == []
    assert len(list(entries.glob("*.json"))) == 1 and not (entries / left).exists()
    assert {path.name for path in entries.iterdir()} >= {
        ".notes.json.tmp",
        "notes.txt",
        f"{'0' * 16}.json.bak",
    }
    assert list(Store.existing(tmp_path / STORE).info()["models"]) == [str(model)]


def test_gc_reaches_no_other_store_through_a_link(anchor, contributions, tmp_path):
    """Promise: nothing of the user's is ever removed. A stranger's store whose folder is a link
    once emptied the one that it led to."""
    mine = merge(anchor, [contributions["law"]], tmp_path / "model").path.parent / STORE
    theirs = Path(shutil.copytree(mine, tmp_path / "theirs"))
    before = everything(mine)
    for name in ("objects", "models"):
        shutil.rmtree(theirs / name)
        (theirs / name).symlink_to(mine / name)
        for use in ("gc", "verify", "info"):
            with pytest.raises(UserError, match=f"{name} is not a directory"):
                getattr(Store.existing(theirs), use)()
        (theirs / name).unlink()
        (theirs / name).mkdir()
    assert everything(mine) == before


def test_gc_leaves_the_parts_of_a_model_that_does_not_tell_what_it_is_made_of(
    anchor, contributions, tmp_path
):
    """Promise: nothing of the user's is ever removed. What a damaged model could be made whole from
    once went with the next `gc`."""
    model = merge(anchor, [contributions["law"]], tmp_path / "model").path
    before = everything(tmp_path / STORE)
    description = (model / "flexolmo.json").read_bytes()
    (model / "flexolmo.json").chmod(0o644)
    (model / "flexolmo.json").write_bytes(description[:-9])
    with pytest.raises(UserError, match="until then nothing is removed"):
        Store.existing(tmp_path / STORE).gc()
    assert everything(tmp_path / STORE) == before
    (model / "flexolmo.json").write_bytes(description)
    assert Store.existing(tmp_path / STORE).gc()["removed"] == []
