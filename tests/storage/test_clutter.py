"""What systems and editors leave in folders, and strangers' other files: wherever they lie, what is
there stays good."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator.info import info
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.documents import document_files
from flexolmo_jax.data.packages import Package, download
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokens import has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import open_contribution
from flexolmo_jax.exchange.screening import _files
from flexolmo_jax.exchange.signature import Trust, keygen
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.storage.files import move
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import children, is_clutter, listing
from tests.object_store import upload
from tests.tiny import documents, write_jsonl

FILES = (
    *(".DS_Store", "._x", "Thumbs.db", "desktop.ini", ".nfs0000000001d2", ".fuse_hidden0001"),
    *("~$notes.txt", ".notes.txt.swp", "notes.txt~", ".#notes.txt"),
)
FOLDERS = (".Trash-1000", "lost+found", ".snapshot", "@eaDir", "__MACOSX")


def litter(directory: Path, name: str = "x.json") -> None:
    """Leaves all of it in a directory, and in every folder of it."""
    folders = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    for folder in folders:
        for file in FILES:
            (folder / file).write_text("not yours")
        for inner in FOLDERS:
            (folder / inner).mkdir()
            (folder / inner / name).write_text("not yours")


def left(directory: Path) -> int:
    return sum(path.is_file() and path.read_text("latin-1") == "not yours"
               for path in directory.rglob("*"))  # fmt: skip


def test_names_that_systems_leave_are_told_from_others():
    assert all(is_clutter(name) and is_clutter(f"weights/{name}") for name in FILES)
    assert all(is_clutter(f"{name}/") and is_clutter(f"a/{name}/b.jsonl") for name in FOLDERS)
    others = (
        "notes.txt",
        ".hidden",
        "a~b",
        "old~/a.jsonl",
        "x.swp.jsonl",
        "weights/c/0",
        "_DIGESTS",
    )
    assert not any(map(is_clutter, others))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The checkpoints of steps 1 and 2."""
    save(tmp_path / "checkpoints", 1)
    save(tmp_path / "checkpoints", 2)
    return tmp_path / "checkpoints"


def save(checkpoints: Path, step: int) -> None:
    with StepCheckpoints(checkpoints, keep=3) as kept:
        kept.save(step, {"params": {"a": np.full(3, step)}}, loss=float(step))


def value(checkpoints: Path, step: int) -> list[int]:
    target = {"a": jax.ShapeDtypeStruct((3,), np.int64)}
    with StepCheckpoints(checkpoints) as kept:
        return kept.restore_part("params", target, step)["a"].tolist()


def test_a_run_saves_and_restores_whatever_systems_leave_in_its_checkpoints(run, capsys):
    litter(run)
    before = left(run)
    save(run, 3)
    assert [value(run, step) for step in (1, 2, 3)] == [[1] * 3, [2] * 3, [3] * 3]
    with StepCheckpoints(run, keep=3) as kept:
        target = {"params": {"a": jax.ShapeDtypeStruct((3,), np.int64)}}
        assert (latest := kept.restore_latest(target)) is not None and latest[0] == 3
        assert kept.choose("best") == 1
    assert left(run) == before and not run.with_name("damaged").exists()
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["notes.txt", "old/notes.txt", "2 copy/x", "24_copy", "2/notes.txt"]
)
def test_a_strangers_file_is_told_by_name_and_damages_no_checkpoint(run, name, capsys):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    save(run, 3)
    assert [value(run, step) for step in (2, 3)] == [[2] * 3, [3] * 3]
    told = capsys.readouterr().err.replace("\n", " ")
    assert "warning" in told and name.removeprefix("2/").partition("/")[0] in told
    assert (run / name).read_text() == "mine" and not run.with_name("damaged").exists()


def test_a_strangers_link_in_a_checkpoint_is_not_read(run, capsys):
    (run / "2" / "link").symlink_to("/dev/zero")
    assert value(run, 2) == [2] * 3 and "'link'" in capsys.readouterr().err


def test_files_that_were_saved_are_still_missed_and_compared(run):
    for file in [*(run / "2").rglob("d/*")][:1]:
        file.unlink()
    with pytest.raises(UserError, match="2 is damaged"):
        value(run, 2)


def test_checkpoints_in_a_bucket_too(run, bucket):
    place = upload(run, bucket / "run" / "checkpoints")
    for name in (".DS_Store", "notes.txt", "2/.DS_Store", "2/__MACOSX/x"):
        (place / name).write_text("not yours")
    save(place, 3)
    assert [value(place, step) for step in (2, 3)] == [[2] * 3, [3] * 3]
    assert (place / ".DS_Store").exists() and not (place / ".DS_Store" / "_DIGESTS").exists()


@pytest.fixture
def littered(anchor, contributions, model, tmp_path) -> Iterator[Path]:
    """An anchor, a contribution and a model, as somebody's computer has them."""
    for name, path in (("anchor", anchor), ("code", contributions["code"]), ("model", model)):
        shutil.copytree(path, tmp_path / name)
        litter(tmp_path / name)
    yield tmp_path


def test_anchors_contributions_and_models_are_what_they_were(littered, anchor, model, capfd):
    for name, original in (("anchor", anchor), ("model", model)):
        made = open_artifact(littered / name)
        made.ensure()
        assert made.description == open_artifact(original).description
        assert verify(littered / name)["verified"]
    assert open_anchor(littered / "anchor").fingerprint == open_artifact(anchor).fingerprint
    capfd.readouterr()
    assert verify(littered / "code", littered / "anchor")["verified"]
    told = capfd.readouterr().err.replace("\n", " ")
    assert "no part of the contribution and is not read" in told and "'.#notes.txt'" in told
    (littered / "anchor" / "weights" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"unknown files: 'weights/notes\.txt'"):
        open_anchor(littered / "anchor")
    (littered / "code" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'notes\.txt'; a contribution is"):
        open_contribution(littered / "code")


def test_a_merge_takes_nothing_of_it_and_a_store_stands_it(littered, tmp_path):
    merged = merge(littered / "anchor", [littered / "code"], tmp_path / "new").path
    assert left(merged) == left(tmp_path / STORE) == 0
    litter(tmp_path / STORE)
    litter(merged)
    store = Store.existing(tmp_path / STORE)
    assert verify(tmp_path / STORE)["objects"] == 2 and info(tmp_path / STORE)["objects"] == 2
    assert list(store.info()["models"]) == [str(merged)]
    again = merge(littered / "anchor", [littered / "code"], tmp_path / "again").path
    assert open_artifact(again).description == open_artifact(merged).description
    assert store.gc()["removed"] == []
    shutil.rmtree(merged)
    shutil.rmtree(again)
    before = left(tmp_path / STORE)
    assert len(store.gc()["left_alone"]) == 2 and left(tmp_path / STORE) == before


def test_what_comes_and_goes_during_a_check_is_no_change(tmp_path):
    (tmp_path / "a").write_text("a")
    verified.once(tmp_path, "claim", lambda: litter(tmp_path))
    verified.once(tmp_path, "claim", lambda: pytest.fail("it was read again"))
    with verified.unchanged([tmp_path]):
        (tmp_path / ".DS_Store").unlink()


def test_data_is_prepared_as_if_it_were_not_there(tiny_tokenizer, tmp_path):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "a.jsonl", documents("law", 40))
    first = prepare([tmp_path / "d"], tiny_tokenizer, 32, tmp_path / "first")
    litter(tmp_path / "d", name="old.jsonl")
    assert [path.name for path in document_files(tmp_path / "d")] == ["a.jsonl"]
    again = prepare([tmp_path / "d"], tiny_tokenizer, 32, tmp_path / "second")
    assert again.files == first.files and again.inputs == first.inputs
    litter(tmp_path / "second", name="x.npy")
    assert not has_tokens(tmp_path / "second") and verify(tmp_path / "second")["verified"]


def test_keys_and_verdicts_are_read_beside_it_and_none_is_overlooked_for_its_name(tmp_path):
    mac = b"\0\5\x16\7\0\2\0\0Mac OS X"
    for folder in ("keys", "verdicts"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".DS_Store").write_bytes(mac)
    keygen(tmp_path / "keys" / "law")
    (tmp_path / "keys" / "law").unlink()
    (tmp_path / "keys" / "._law.pub").write_bytes(mac)
    assert list((Trust.of(tmp_path / "keys").keys or {}).values()) == ["law"]
    (tmp_path / "verdicts" / "._law.json").write_bytes(mac)
    for name in ("~$law.json", "._care.json", "law.json"):
        (tmp_path / "verdicts" / name).write_text("{}")
    found = [path.name for path in _files([tmp_path / "verdicts"])]
    assert found == ["._care.json", "law.json", "~$law.json"]
    keygen(tmp_path / "keys" / "care")
    (tmp_path / "keys" / "care.pub").rename(tmp_path / "keys" / "._care.pub")
    assert set((Trust.of(tmp_path / "keys").keys or {}).values()) == {"law", "._care"}


def test_an_export_is_imported_beside_it(model, tmp_path):
    export = ["export-hf", str(model), str(tmp_path / "hf"), "--drop-bias"]
    assert cli.main(export) == 0
    litter(tmp_path / "hf")
    (tmp_path / "hf" / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    assert import_hf(tmp_path / "hf", tmp_path / "back").experts[0] == "anchor"
    assert left(tmp_path / "back") == 0


def test_a_folder_that_looks_empty_is_said_to_hold_what_it_does(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    with pytest.raises(UserError, match=r"is not empty \(it holds '\.DS_Store'\)"):
        check_new(tmp_path)


def test_a_move_in_a_bucket_leaves_none_of_it_behind(bucket):
    for name in (".DS_Store", "b"):
        (bucket / "a" / name).write_text("x")
    assert list(listing(bucket / "a")) == ["b"]
    assert [path.name for path in children(bucket / "a")] == ["b"]
    move(bucket / "a", bucket / "c")
    assert not listing(bucket / "a", clutter=True)
    assert set(listing(bucket / "c", clutter=True)) == {".DS_Store", "b"}


def test_a_download_is_taken_from_a_cache_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path))
    package = Package("apt", "fortunes", "1.0", "0" * 64)
    folder = tmp_path / "apt-fortunes-1.0"
    folder.mkdir()
    for name in (".DS_Store", "fortunes.deb"):
        (folder / name).write_text("x")
    assert download(package) == folder / "fortunes.deb"
