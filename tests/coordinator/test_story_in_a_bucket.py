"""The merger and its store in a bucket: as on a disk, but copies are the object store's, and
nothing is renamed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.coordinator.merge import append, merge, opt_out, replace
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify, verify_receipt
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import load
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.storage import files
from flexolmo_jax.storage.outputs import is_whole
from flexolmo_jax.storage.paths import children, listing
from tests.object_store import upload


@pytest.fixture
def handed_over(bucket: Path, anchor: Path, contributions: dict[str, Path]) -> dict[str, Path]:
    """The anchor and the contributions in the bucket."""
    return {
        name: upload(path, bucket / name)
        for name, path in {"anchor": anchor, **contributions}.items()
    }


@pytest.fixture
def merged(bucket: Path, handed_over: dict[str, Path]) -> Path:
    return merge(
        handed_over["anchor"],
        [handed_over[name] for name in ("code", "law", "care")],
        bucket / "model",
        active=2,
    ).path


def contents(directory: Path) -> dict[str, bytes]:
    return {
        name: (directory / name).read_bytes()
        for name in listing(directory)
        if name != "receipt.json"
    }


def test_everything_in_a_bucket_is_what_it_is_on_a_disk(
    bucket, handed_over, merged, model, anchor, contributions, tmp_path, capsys
):
    assert contents(merged) == contents(model)
    assert (
        verify(handed_over["anchor"])["verified"]
        and verify(handed_over["code"], handed_over["anchor"])["verified"]
    )
    assert verify(merged, handed_over["anchor"])["verified"] and verify(bucket / STORE) == {
        "path": str(bucket / STORE), "kind": "store", "verified": True, "objects": 4,
    }  # fmt: skip
    capsys.readouterr()
    without = opt_out(merged, ["law"], bucket / "without").path
    assert "server-side copy" in capsys.readouterr().err
    assert contents(without) == contents(
        merge(
            anchor, [contributions["code"], contributions["care"]], tmp_path / "never", active=2
        ).path
    )
    receipt = json.loads((without / "receipt.json").read_text())
    assert receipt["models_that_still_hold_it"] == [merged.name] and receipt["store_still_holds_it"]
    assert verify_receipt(without / "receipt.json", without)["grade"] == "exact"
    with pytest.raises(UserError, match="still holds"):
        verify_receipt(without / "receipt.json", merged)
    again = append(without, handed_over["law"], bucket / "again").path
    assert open_artifact(again).experts == ("anchor", "code", "care", "law")
    assert contents(replace(again, handed_over["law"], bucket / "replaced").path) == contents(again)


def test_a_model_in_a_bucket_loads_here_and_with_plain_orbax(merged, model):
    local, remote = load(model), load(str(merged))
    for path, array in flatten(local.params).items():
        np.testing.assert_array_equal(
            np.asarray(flatten(remote.params)[path]), np.asarray(array), err_msg=path
        )
    plain = ocp.StandardCheckpointer().restore(
        str(merged / "weights"), jax.tree.map(np.zeros_like, local.params)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, local.params)


def test_merging_goes_from_a_disk_to_a_bucket_and_back(
    bucket, anchor, contributions, merged, tmp_path, capsys
):
    there = merge(
        anchor,
        list(contributions.values()),
        bucket / "from-here",
        active=2,
        store_path=tmp_path / "store",
    )
    assert "stream" in capsys.readouterr().err
    assert contents(there.path) == contents(merged)
    back = opt_out(there.path, ["law"], tmp_path / "back", store_path=tmp_path / "store").path
    assert verify(back)["verified"]


def test_gc_removes_from_a_bucket_what_no_model_needs_once_it_is_old(bucket, merged, monkeypatch):
    store = Store.existing(bucket / STORE)
    files.discard(merged)
    assert children(merged) == []
    assert store.gc()["removed"] == []  # somebody may be about to use it
    monkeypatch.setattr(files, "GRACE", -5.0)
    assert len(store.gc()["removed"]) == 4 and [path.name for path in children(bucket / STORE)] == [
        "store.json"
    ]


def test_a_merge_killed_on_its_way_into_a_bucket_is_no_model_and_a_rerun_finishes(
    bucket, handed_over, model
):
    program = (
        "import os, signal, sys\nfrom flexolmo_jax.storage import files\nfrom"
        " flexolmo_jax.coordinator.merge import merge\nfrom flexolmo_jax.storage.paths import"
        " path_of\nplace, left = path_of(sys.argv[1]), int(sys.argv[2])\ndef observe(operation,"
        " path):\n    global left\n    left -= 1\n    if left == 0: os.kill(os.getpid(),"
        " signal.SIGKILL)\nfiles.observer = observe\nmerge(place / 'anchor', [place / name for name"
        " in ('code', 'law', 'care')], place / 'model', active=2)\n"
    )
    killed = 0
    for after in range(1, 1000, 13):
        result = subprocess.run(
            [sys.executable, "-c", program, str(bucket), str(after)],
            env=os.environ,
            capture_output=True,
            text=True,
        )
        if result.returncode == 0:
            break
        assert result.returncode == -9, result.stderr
        killed += 1
        assert not is_whole(bucket / "model")
        with pytest.raises(UserError, match=r"not a run, anchor or model|does not exist"):
            open_artifact(bucket / "model")
    assert killed >= 4 and contents(bucket / "model") == contents(model)
    assert verify(bucket / STORE)["objects"] == 4


def test_mistakes_with_buckets_are_told_in_one_line(bucket, handed_over, merged, capsys, tmp_path):
    name = str(bucket)
    for arguments, message in (
        (
            ["merge", f"{name}/code", "--anchor", f"{name}/anchor", "--out", f"{name}/model"],
            "exists and is not empty",
        ),
        (
            [
                "merge",
                f"{name}/code",
                "--anchor",
                f"{name}/anchor",
                "--out",
                f"{name}/other",
                "--by",
                "link",
            ],
            "has no link; try --by auto",
        ),
        (["verify", "gs://no-such-bucket/model"], "gs://no-such-bucket/model"),
        (
            [
                "merge",
                f"{name}/code",
                "--anchor",
                f"{name}/anchor",
                "--out",
                "gs://no-such-bucket/model",
            ],
            "there is no such bucket",
        ),
    ):
        status = cli.main(arguments)
        told = capsys.readouterr().err
        assert status == 2 and message in told and "Traceback" not in told, told
    assert children(bucket / "other") == []


def test_a_changed_object_is_found(merged):
    shard = max((name for name in listing(merged) if "experts.gate/c/" in name), key=str)
    bytes_ = bytearray((merged / shard).read_bytes())
    bytes_[len(bytes_) // 2] ^= 4
    (merged / shard).write_bytes(bytes(bytes_))
    with pytest.raises(UserError, match="gate"):
        verify(merged)
    (merged / shard).unlink()
    with pytest.raises(UserError, match="is missing"):
        verify(merged)
    with pytest.raises(UserError, match="is not whole"):
        load(merged)
