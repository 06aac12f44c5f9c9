"""Runs that were moved or copied: their anchor is found beside them, or where the user says. Its
fingerprint decides."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax import cli, load
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.coordinator.merge import apply_tuning, opt_out
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.errors import UserError
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from tests.object_store import upload
from tests.tiny import pair_config, run_config


@pytest.fixture(scope="module")
def lab(tmp_path_factory, anchor, prepared, pair_runs) -> Path:
    """A folder in which a pair was trained. It is always moved away from where that was."""
    root = tmp_path_factory.mktemp("labs")
    old = root / "old"
    shutil.copytree(anchor, old / "anchors" / "v1")
    shutil.copytree(prepared["code"], old / "data" / "code")
    shutil.copytree(pair_runs["code"], old / "runs" / "code")
    config = pair_config(old / "anchors" / "v1", old / "data" / "code", "code", "train.steps=8")
    train_pair(config, old / "runs" / "code")
    old.rename(root / "lab")
    return root / "lab"


@pytest.fixture
def moved(lab: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab, tmp_path / "lab"))


@pytest.fixture
def apart(lab: Path, tmp_path: Path) -> Path:
    """The run alone; the anchor has another name elsewhere."""
    shutil.copytree(lab / "runs" / "code", tmp_path / "run")
    shutil.copytree(lab / "anchors" / "v1", tmp_path / "elsewhere" / "base")
    return tmp_path


IDS = np.arange(8)[None] + 10


def test_a_run_and_its_anchor_that_were_moved_together_are_used(moved, pair_runs, contributions):
    run = moved / "runs" / "code"
    expected = load(pair_runs["code"]).logits(IDS)
    np.testing.assert_array_equal(load(run).logits(IDS), expected)
    made = package(run, moved / "contribution")
    before = json.loads((contributions["code"] / "manifest.json").read_text())
    assert made.manifest == before  # its scores too: the data were found


VERBS = {
    "eval": ("eval", "RUN", "--data", "DATA", "--limit", "2"),
    "extract": ("extract", "RUN", "--documents", "TEXT", "--limit", "1", "--prefix", "2",
                "--tokens", "2", "--samples", "1"),
    "generate": ("generate", "RUN", "--prompt", "the", "--max-new-tokens", "2"),
    "export-hf": ("export-hf", "RUN", "OUT", "--drop-bias", "--eval-data", "DATA"),
    "package": ("package", "RUN", "--out", "OUT"),
}  # fmt: skip


@pytest.mark.parametrize("words", VERBS.values(), ids=VERBS)
def test_a_user_says_where_the_anchor_is(apart, words, prepared, corpora, anchor32, capfd):
    given = {"RUN": apart / "run", "DATA": prepared["code"], "TEXT": corpora["code"]}
    command = [str(given.get(word, word)).replace("OUT", str(apart / "out")) for word in words]
    if "package" in words:  # its data stayed where they were read
        config = (apart / "run" / "config.yaml").read_text()
        path = next(line for line in config.splitlines() if line.endswith("data/code"))
        kept = path.partition("path: ")[0] + f"path: {prepared['code']}"
        (apart / "run" / "config.yaml").write_text(config.replace(path, kept))
    assert cli.main(command) == 2
    told = capfd.readouterr().err
    assert "which is not at" in told and "give the place where it is (--anchor)" in told
    assert cli.main([*command, "--anchor", str(anchor32)]) == 2
    told = capfd.readouterr().err
    for other in (anchor32, apart / "elsewhere" / "base"):
        assert str(open_artifact(other).fingerprint) in told
    assert not (apart / "out").exists()
    assert cli.main([*command, "--anchor", str(apart / "elsewhere" / "base")]) == 0


def test_the_fingerprint_decides_and_not_the_place(moved, apart, anchor32, pair_runs):
    """Another anchor at the old place, and at the place beside the run."""
    run, beside = moved / "runs" / "code", moved / "anchors" / "v1"
    beside.rename(moved / "kept")
    shutil.copytree(anchor32, beside)
    with pytest.raises(UserError, match="which is not at"):
        load(run)
    with pytest.raises(UserError, match="was trained on another version of"):
        load(run, anchor=beside)
    expected = load(pair_runs["code"]).logits(IDS)
    np.testing.assert_array_equal(load(run, anchor=moved / "kept").logits(IDS), expected)
    recorded = Path(open_artifact(run).description["base"])
    shutil.copytree(anchor32, recorded)
    try:
        with pytest.raises(UserError, match=f"another version of {recorded}"):
            load(run)
        shutil.rmtree(beside)
        (moved / "kept").rename(beside)
        np.testing.assert_array_equal(load(run).logits(IDS), expected)
    finally:
        shutil.rmtree(recorded.parents[1])


def test_what_stands_on_no_anchor_takes_none(anchor, anchor_run, model):
    uses: list[Callable[[], object]] = [
        lambda: load(anchor, anchor=anchor),
        lambda: load(anchor_run, anchor=anchor),
        lambda: load(model, anchor=anchor),
    ]
    for use in uses:
        with pytest.raises(UserError, match="needs no other directory; leave out --anchor"):
            use()


def test_a_router_run_and_its_model_too(model, prepared, tmp_path):
    old, lab = tmp_path / "old", tmp_path / "lab"
    shutil.copytree(model, old / "model")
    config = run_config(
        "router", prepared["code"], "train.steps=1", router={"model": str(old / "model")}
    )
    train_router(config, old / "runs" / "router")
    store = {"store_path": model.parent / "flexolmo-store"}
    old.rename(lab)
    tuned = apply_tuning(lab / "runs" / "router", tmp_path / "tuned", **store)
    assert load(lab / "runs" / "router").experts == tuned.experts
    (lab / "model").rename(tmp_path / "far")
    with pytest.raises(UserError, match=r"on the model .* which is not at"):
        load(lab / "runs" / "router")
    assert load(lab / "runs" / "router", anchor=tmp_path / "far").experts == tuned.experts
    left = opt_out(
        lab / "runs" / "router", ["law"], tmp_path / "left", base_at=tmp_path / "far", **store
    )
    assert left.experts == ("anchor", "code", "care")


def test_a_copy_in_a_bucket_and_one_out_of_it_too(lab, bucket, pair_runs, tmp_path):
    place = upload(lab, bucket / "lab")
    expected = load(pair_runs["code"]).logits(IDS)
    np.testing.assert_array_equal(load(place / "runs" / "code").logits(IDS), expected)
    config = pair_config(place / "anchors" / "v1", place / "data" / "code", "code", "train.steps=8")
    train_pair(config, place / "runs" / "code")  # from here on it stands on what is in the bucket
    base = open_artifact(place / "runs" / "code").description["base"]
    assert base == str(place / "anchors" / "v1")
    back = Path(shutil.copytree(lab, tmp_path / "lab"))
    (back / "runs" / "code" / "flexolmo.json").write_bytes(
        (place / "runs" / "code" / "flexolmo.json").read_bytes()
    )
    assert open_artifact(back / "runs" / "code").base().path == back / "anchors" / "v1"
