"""What makes a run the same run: its config and the content of what it reads, however that is
spelled and wherever it lies."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.data.tokens import TokenRecords
from flexolmo_jax.description import DESCRIPTION, read_sealed, sealed_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.owner.pair import train_pair
from tests.tiny import SEQ_LEN, documents, pair_config, run_config, write_jsonl


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer: Tokenizer) -> Path:
    """Documents, a tokenizer, prepared data to evaluate on, and a run on them."""
    root = tmp_path_factory.mktemp("world")
    (root / "docs").mkdir()
    for name, domain in (("a", "public"), ("b", "law")):
        write_jsonl(root / "docs" / f"{name}.jsonl", documents(domain, 80))
    tiny_tokenizer.save(root / "tokenizer.json")
    new_eval(root, "code")
    start(root, root)
    return root


def new_eval(root: Path, domain: str) -> None:
    tokenizer = Tokenizer.load(root / "tokenizer.json")
    text = write_jsonl(root / "eval.jsonl", documents(domain, 60))
    shutil.rmtree(root / "eval", ignore_errors=True)
    prepare([text], tokenizer, SEQ_LEN, root / "eval", heldout=0.3)


def start(root: Path, spelled: Path, *more: str, out: Path | None = None) -> int:
    """The run's command, with its paths spelled so."""
    sources = (f"data.eval=[{{path: {spelled}/eval, name: e}}]",
               f"data.tokenizer={spelled}/tokenizer.json")  # fmt: skip
    run = run_config("anchor", spelled / "docs", "train.steps=2", *sources, *more)
    (root / "run.yaml").write_text(dump_yaml(run))
    return cli.main(["train", str(root / "run.yaml"), "--out", str(out or root / "run")])


@pytest.fixture
def here(world: Path, tmp_path: Path) -> Path:
    """All of it, moved together."""
    return Path(shutil.copytree(world, tmp_path / "world"))


SPELLED = {
    "moved": lambda root: root,
    "with .": lambda root: root / "docs" / ".." / ".",
    "relative": lambda root: Path(os.path.relpath(root)),
    "through a link": lambda root: (root / "link").symlink_to(root) or root / "link",
}


@pytest.mark.parametrize("spelled", SPELLED.values(), ids=SPELLED)
def test_a_run_goes_on_however_its_paths_are_spelled(here, spelled, capfd):
    assert start(here, spelled(here)) == 0
    assert "resumes from step 2" in capfd.readouterr().err


def edited(root: Path) -> None:
    text = (root / "docs" / "a.jsonl").read_text()
    (root / "docs" / "a.jsonl").write_text(text.replace("river", "rivet"))


def added(root: Path) -> None:
    write_jsonl(root / "docs" / "c.jsonl", documents("care", 20))


def other_evaluation_data(root: Path) -> None:
    new_eval(root, "care")


def another_tokenizer(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    train_tokenizer([root / "docs" / "b.jsonl"], 300, root / "tokenizer.json")
    new_eval(root, "code")


CHANGES = {
    "documents edited": (edited, r"data\.train\[0\]\.path: \S+docs held 160 documents of \d+ tok"),
    "a file added": (added, r"\(files: 2\); now \S+docs holds 180 documents .* \(files: 3\)"),
    "a file gone": (lambda root: (root / "docs" / "b.jsonl").unlink(), "docs holds 80 documents"),
    "other evaluation data": (other_evaluation_data, r"data\.eval\[0\]\.path: \S+eval held"),
    "another tokenizer": (another_tokenizer, r"another tokenizer \(data\.tokenizer\) than \S+json"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES)
def test_other_content_at_the_same_path_is_refused_and_named(here, change, told, capfd):
    change(here)
    before = {p: p.read_bytes() for p in (here / "run").rglob("*") if p.is_file()}
    capfd.readouterr()
    assert start(here, here) == 2
    (line,) = [one for one in capfd.readouterr().err.splitlines() if one.startswith("flexolmo: ")]
    assert re.search(told, line) and "give a new place (--out" in line
    assert {p: p.read_bytes() for p in (here / "run").rglob("*") if p.is_file()} == before


def test_a_run_of_an_earlier_version_goes_on_where_its_data_lie(here, world, capfd):
    """It noted no content: then places are compared, which may be spelled anyhow."""
    description = read_sealed(here / "run" / DESCRIPTION)
    description.pop("inputs")
    (here / "run" / DESCRIPTION).write_text(sealed_json(description))
    assert start(here, here) == 2
    assert "holds a run with another data.eval" in capfd.readouterr().err
    assert start(here, world / "docs" / "..", out=here / "run") == 0
    assert "inputs" in read_sealed(here / "run" / DESCRIPTION)


def test_a_run_that_has_saved_nothing_begins_anew_on_what_is_there(here, capfd):
    assert start(here, here) == 0  # from here on its data are here
    shutil.rmtree(here / "run" / "checkpoints")
    edited(here)
    capfd.readouterr()
    assert start(here, here) == 0
    assert "resumes" not in capfd.readouterr().err
    shutil.rmtree(here / "run" / "checkpoints")
    (here / "docs").rename(here / "other")
    assert start(here, here, f"data.train=[{{path: {here}/other}}]") == 0  # the same documents
    write_jsonl(here / "b.jsonl", documents("law", 80))
    assert start(here, here, f"data.train=[{{path: {here}/b.jsonl}}]") == 2


def test_other_weights_to_start_from_are_refused(here, anchor, anchor32, capfd):
    shutil.copytree(anchor, here / "start")
    init = f"train.init={here / 'start'}"
    data = (f"data.train=[{{path: {here}/docs}}]", "data.eval=[]", "data.tokenizer=''")
    assert start(here, here, init, *data, out=here / "more") == 0
    (here / "link").symlink_to(here / "start")
    assert start(here, here, f"train.init={here / 'link'}", *data, out=here / "more") == 0
    shutil.rmtree(here / "start")
    shutil.copytree(anchor32, here / "start")
    assert start(here, here, init, *data, out=here / "more") == 2
    assert "train.init: " in capfd.readouterr().err
    # a run is the same one while it goes on, and another one trained anew is not
    shutil.copytree(here / "run", here / "earlier")
    init = f"train.init={here / 'earlier'}"
    assert start(here, here, init, *data, out=here / "of-run") == 0
    (here / "earlier" / "metrics.jsonl").write_text("")
    assert start(here, here, init, *data, out=here / "of-run") == 0
    config = (here / "earlier" / "config.yaml").read_text()
    (here / "earlier" / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"))
    assert start(here, here, init, *data, out=here / "of-run") == 2
    assert "train.init: " in capfd.readouterr().err


def test_a_pair_goes_on_with_its_anchor_wherever_it_is(
    anchor, prepared, pair_runs, tmp_path, monkeypatch, capfd
):
    run = shutil.copytree(pair_runs["code"], tmp_path / "run")
    shutil.copytree(anchor, tmp_path / "anchor")
    shutil.copytree(prepared["code"], tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "anchor")
    monkeypatch.chdir(tmp_path)
    for spelled in ("anchor", "./anchor/", "link", str(tmp_path / "anchor")):
        public = [f"pair.public={tmp_path}/anchor/public"] if spelled == "link" else []
        config = pair_config(Path(spelled), Path("data"), "code", "train.steps=8", *public)
        assert train_pair(config, run)["step"] == 8
    assert read_sealed(run / DESCRIPTION)["base"] == str(tmp_path / "anchor")
    shutil.copytree(prepared["law"], tmp_path / "other")
    for data, public in (("data", "other"), ("other", "anchor/public")):
        config = pair_config(Path("anchor"), Path(data), "code", "train.steps=8",
                             f"pair.public={public}")  # fmt: skip
        key = "pair.public" if data == "data" else r"data\.train\[0\]\.path"
        with pytest.raises(UserError, match=rf"read something else: {key}: .* held 160 documents"):
            train_pair(config, run)


def test_a_router_run_is_of_its_model_and_its_data(model, prepared, tmp_path, monkeypatch):
    def tuned(place: str, data: str) -> int:
        run = run_config("router", Path(data), "train.steps=1", router={"model": place})
        return train_router(run, tmp_path / "run")["step"]

    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(prepared["code"], tmp_path / "data")
    assert tuned(str(model), str(prepared["code"])) == 1
    monkeypatch.chdir(tmp_path)
    assert tuned("model/", "./data") == 1
    shutil.rmtree("data")
    shutil.copytree(prepared["law"], "data")
    with pytest.raises(UserError, match=r"data\.train\[0\]\.path: .* now \S+data holds"):
        tuned("model/", "data")


def test_the_content_of_token_files_is_their_ids(tiny_tokenizer, tmp_path):
    """In whatever files they lie; of many, samples from one end to the other."""
    ids = np.random.default_rng(0).integers(0, 300, 200_000, dtype=np.uint16)

    def content(name: str, *parts: np.ndarray) -> str:
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            np.save(tmp_path / name / f"{number}.npy", part)
        return TokenRecords(tmp_path / name, tiny_tokenizer, 32).content.sha256

    first = content("a", ids)
    assert content("b", ids) == first == content("c", ids.astype(np.uint32))
    changed = ids.copy()
    changed[150_001] ^= 1
    assert len({first, content("d", changed), content("e", ids[:150_000], ids[150_000:])}) == 3
    assert content("f", ids[:-1]) != first


@pytest.mark.parametrize("place", [0, 9_000_000, 19_999_999])
def test_a_long_corpus_that_was_made_anew_is_another(tiny_tokenizer, tmp_path, place):
    ids = np.zeros(20_000_000, np.uint16)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", ids)
        ids[place:] += 1
    one, other = (TokenRecords(tmp_path / f"{n}.npy", tiny_tokenizer, 32).content for n in "ab")
    assert one.holds == other.holds == "20000000 tokens (files: 1)" and one != other
