"""Attacks on what lies on a coordinator's disk. The promise: nothing of the user's is ever removed,
changed or merged unseen."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_jax.artifact import open_artifact, sealed_json
from flexolmo_jax.cli import main
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import append, merge, opt_out, replace
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import TENSORS
from flexolmo_jax.loaded import load
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


def test_what_a_store_holds_and_knows_is_on_the_disk_before_it_is_seen(
    anchor, contributions, tmp_path, monkeypatch
):
    """Promise: what is verified is what runs. After a power cut there is no object, record or model
    whose bytes were only in memory."""
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
        with pytest.raises(UserError, match="its record is that of another object"):
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


@pytest.mark.parametrize(("out", "store"), [("x", "x"), ("x/model", "x"), ("x", "x/store")])
def test_a_model_and_its_store_do_not_lie_in_each_other(
    anchor, contributions, tmp_path, out, store
):
    """Promise: a merge that fails leaves nothing that a later command takes for a store with a
    model."""
    with pytest.raises(UserError, match=r"may not contain each other|lies inside the store"):
        merge(anchor, [contributions["law"]], tmp_path / out, store_path=tmp_path / store)
    assert not (tmp_path / store).exists()
