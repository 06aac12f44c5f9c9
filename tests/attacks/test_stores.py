"""Attacks on what lies on a coordinator's disk. The promise: nothing of the user's is ever removed,
changed or merged unseen."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_jax.artifact import open_artifact, sealed_json
from flexolmo_jax.cli import main
from flexolmo_jax.coordinator.merge import merge, opt_out
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage import files
from tests.faults.kill_everywhere import contents
from tests.recorder import Recorder


def everything(directory: Path) -> dict[str, bytes | str]:
    """Names and contents of all that lies there."""
    return {
        str(p.relative_to(directory)): (
            os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
        )
        for p in sorted(directory.rglob("*"))
    }


def users_folder(path: Path) -> Path:
    """What somebody may have: documents, a git repository's folder, names that look like a
    store's."""
    (path / "objects" / "ab").mkdir(parents=True)
    (path / "objects" / ("e" * 64) / "weights").mkdir(parents=True)
    (path / "models").mkdir()
    (path / "thesis.txt").write_text("years of work")
    (path / "objects" / "ab" / "cdef").write_text("a commit")
    (path / "objects" / ("e" * 64) / "weights" / "w").write_text("not ours")
    return path


@pytest.mark.parametrize("verb", ["merge", "opt-out", "append", "replace", "gc", "tune"])
def test_a_folder_that_is_no_store_is_neither_written_nor_emptied(
    anchor, contributions, model, corpora, tmp_path, capsys, verb
):
    """A wrong --store costs nothing, whatever the merge then does."""
    folder = users_folder(tmp_path / "documents")
    before = everything(folder)
    code, law = str(contributions["code"]), str(contributions["law"])
    arguments = {
        "merge": ["merge", "--anchor", str(anchor), code],
        "opt-out": ["opt-out", str(model), "--expert", "law", "--untuned"],
        "append": ["append", str(model), law],
        "replace": ["replace", str(model), law],
        "gc": ["gc", str(folder)],
        "tune": [
            "tune",
            str(model),
            "--proxy",
            f"code={corpora['code']}",
            "--public",
            str(corpora["public"]),
            "--set",
            "train.steps=1",
        ],
    }[verb]
    if verb != "gc":
        arguments += ["--store", str(folder), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "is not a store" in told or "already has an expert" in told, told
    assert everything(folder) == before and not (tmp_path / "out").exists()


def test_a_merge_that_fails_leaves_the_working_directory_alone(
    anchor, contributions, tmp_path, monkeypatch, capsys
):
    """`--store .` once deleted it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path / "work")
    assert (
        main(
            [
                "merge",
                "--anchor",
                str(anchor),
                str(contributions["code"]),
                "--store",
                ".",
                "--out",
                "../out",
            ]
        )
        == 2
    )
    assert everything(tmp_path) == {"work": "folder", "work/thesis.txt": b"years of work"}


def test_a_new_store_is_undone_file_by_file(anchor, contributions, tmp_path):
    """What somebody puts into a store that is being made stays when the merge fails."""

    def full(operation: str, path: Path) -> None:
        if path.name == "flexolmo.json":
            (tmp_path / "store" / "objects" / "thesis.txt").write_text("years of work")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.observer = full
    try:
        with pytest.raises(UserError, match="no space left"):
            merge(anchor, [contributions["code"]], tmp_path / "out", store_path=tmp_path / "store")
    finally:
        files.observer = None
    assert (tmp_path / "store" / "objects" / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in (tmp_path / "store" / "objects").iterdir()] == ["thesis.txt"]


def test_a_failing_merge_removes_nothing_of_one_that_succeeded_meanwhile(
    anchor, contributions, tmp_path
):
    """Two coordinators' processes begin the same new store; the second succeeds before the first
    fails."""
    done = False

    def fails_late(operation: str, path: Path) -> None:
        nonlocal done
        if path.name == "flexolmo.json" and not done:
            done = True
            program = (
                "import sys; from pathlib import Path; from flexolmo_jax.coordinator.merge import"
                " merge\nanchor, law, out, store = map(Path, sys.argv[1:]); merge(anchor, [law],"
                " out, store_path=store)\n"
            )
            other = [
                sys.executable,
                "-c",
                program,
                *map(str, (anchor, contributions["law"], tmp_path / "other", tmp_path / "store")),
            ]
            subprocess.run(other, check=True, env=os.environ)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.observer = fails_late
    try:
        with pytest.raises(UserError, match="no space left"):
            merge(anchor, [contributions["code"]], tmp_path / "out", store_path=tmp_path / "store")
    finally:
        files.observer = None
    # the anchor and law; code went with the merge that failed
    assert verify(tmp_path / "store")["objects"] == 2
    assert verify(tmp_path / "other")["verified"] and contents(
        opt_out(
            tmp_path / "other",
            ["law"],
            tmp_path / "none",
            untuned=True,
            store_path=tmp_path / "store",
        ).path
    )


def test_no_model_is_written_into_a_store(anchor, contributions, tmp_path):
    """gc would take it for an object."""
    merge(anchor, [contributions["code"]], tmp_path / "model")
    for place in ("objects/mine", "models/mine", "mine"):
        with pytest.raises(UserError, match="lies inside the store"):
            merge(
                anchor,
                [contributions["code"]],
                tmp_path / STORE / place,
                store_path=tmp_path / "other",
            )
    assert not (tmp_path / "other").exists()


def test_nothing_is_written_into_what_holds_exactly_its_own_files(
    anchor, contributions, model, tmp_path
):
    """It would be refused by everybody from then on."""
    for place in (anchor, model, contributions["law"], anchor / "public"):
        with pytest.raises(UserError, match=r"lies inside the (anchor or model|contribution)"):
            merge(anchor, [contributions["code"]], place / "mine", store_path=tmp_path / "store")
    with pytest.raises(UserError, match="lies inside the anchor or model"):
        merge(anchor, [contributions["code"]], tmp_path / "out", store_path=anchor / "store")
    assert (
        verify(anchor)["verified"]
        and verify(model)["verified"]
        and verify(contributions["law"])["verified"]
    )


def test_a_store_of_another_version_is_refused_by_name(anchor, contributions, tmp_path):
    """Earlier versions did not say in a file what a store is."""
    merge(anchor, [contributions["code"]], tmp_path / "model")
    (tmp_path / STORE / "store.json").unlink()
    before = everything(tmp_path / STORE)
    for use in (
        lambda: Store.existing(tmp_path / STORE),
        lambda: merge(anchor, [contributions["law"]], tmp_path / "other"),
    ):
        with pytest.raises(UserError, match=r"no store\.json"):
            use()
    (tmp_path / STORE / "store.json").write_text(
        sealed_json({"kind": "store", "format": 9, "id": "0"})
    )
    with pytest.raises(UserError, match="has the format 9"):
        merge(anchor, [contributions["law"]], tmp_path / "other")
    (tmp_path / STORE / "store.json").write_text(
        sealed_json({"kind": "model", "format": 1, "id": "0"})
    )
    with pytest.raises(UserError, match="give another --store"):
        merge(anchor, [contributions["law"]], tmp_path / "other")
    (tmp_path / STORE / "store.json").unlink()
    assert everything(tmp_path / STORE) == before


def test_verifying_writes_nothing(tmp_path):
    """Not even into a folder that looks like a store."""
    folder = users_folder(tmp_path / "documents")
    before = everything(folder)
    with pytest.raises(UserError):
        verify(folder)
    assert everything(folder) == before


def test_opting_out_of_a_damaged_model_is_refused(model, tmp_path):
    """It once exited 0 and wrote a model that did not verify."""
    for number, name in enumerate(
        ("weights/experts.up", "weights/trunk.embedding", "tokenizer.json")
    ):
        copy = Path(shutil.copytree(model, tmp_path / str(number)))
        file = next(p for p in (copy / name, *sorted((copy / name).rglob("c/**/*"))) if p.is_file())
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError):
            opt_out(copy, ["law"], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert open_artifact(model).experts


def test_what_a_store_holds_and_knows_is_on_the_disk_before_it_is_seen(
    anchor, contributions, tmp_path, monkeypatch
):
    """Promise: what is verified is what runs. After a power cut there is no object, inventory or
    model whose bytes were only in memory."""
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        model = merge(anchor, [contributions["code"]], tmp_path / "model").path
    objects, models = (
        sorted((tmp_path / STORE / "objects").iterdir()),
        sorted((tmp_path / STORE / "models").iterdir()),
    )
    assert len(objects) == 2 and len(models) == 1
    for path in (*objects, *models, model):
        recorder.expect_durable(path)
    # the store knows of it before it is there
    assert recorder.renamed.index(models[0]) < recorder.renamed.index(model)
    recorder.expect_durable(tmp_path / STORE, [tmp_path / STORE / "store.json"])


def test_a_store_that_does_not_know_where_its_models_are_removes_nothing(
    anchor, contributions, tmp_path
):
    """Promise: nothing of the user's is removed. A damaged entry may be of a model that needs every
    object here."""
    model = merge(anchor, [contributions["code"]], tmp_path / "model").path
    (entry,) = (tmp_path / STORE / "models").iterdir()
    text = entry.read_text()
    before = everything(tmp_path / STORE / "objects")
    for damaged in (
        "",
        "{}",
        text.replace("model", "other"),
        sealed_json({"path": 3}),
        sealed_json({"path": "elsewhere:/x"}),
    ):
        entry.write_text(damaged)
        with pytest.raises(UserError, match=r"is damaged .*; remove it"):
            Store.existing(tmp_path / STORE).gc()
        assert everything(tmp_path / STORE / "objects") == before
    entry.write_text(text)
    assert Store.existing(tmp_path / STORE).gc()["removed"] == [] and verify(model)["verified"]


def test_a_merge_that_fails_takes_nothing_from_a_store_that_was_there(
    anchor, contributions, tmp_path
):
    """Promise: nothing of the user's is removed. What no model needs is for `gc` to remove, when
    somebody asks for it."""
    shutil.rmtree(merge(anchor, [contributions["code"]], tmp_path / "model").path)
    before = everything(tmp_path / STORE)

    def full(operation: str, path: Path) -> None:
        if path.name == "flexolmo.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.observer = full
    try:
        with pytest.raises(UserError, match="no space left"):
            merge(anchor, [contributions["law"]], tmp_path / "model")
    finally:
        files.observer = None
    assert everything(tmp_path / STORE).items() >= before.items()


@pytest.mark.parametrize("name", ["objects", "models"])
def test_a_store_without_its_folders_is_refused_at_once(anchor, contributions, tmp_path, name):
    """Promises: nothing hangs, nothing is removed unseen. A pipe in a folder's place was waited
    for; without `models` all objects went."""
    merge(anchor, [contributions["law"]], tmp_path / "model")
    folder = tmp_path / STORE / name
    folder.rename(tmp_path / "aside")
    before = everything(tmp_path)
    for make in (lambda: None, lambda: os.mkfifo(folder), folder.touch):
        make()
        told = subprocess.run(
            [sys.executable, "-m", "flexolmo_jax.cli", "gc", str(folder.parent)],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert told.returncode == 2 and f"{name} is not a directory" in told.stderr, told
        folder.unlink(missing_ok=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(("out", "store"), [("x", "x"), ("x/model", "x"), ("x", "x/store")])
def test_a_model_and_its_store_do_not_lie_in_each_other(
    anchor, contributions, tmp_path, out, store
):
    """Promise: a merge that fails leaves nothing that a later command takes for a store with a
    model."""
    with pytest.raises(UserError, match=r"may not contain each other|lies inside the store"):
        merge(anchor, [contributions["law"]], tmp_path / out, store_path=tmp_path / store)
    assert not (tmp_path / store).exists()
