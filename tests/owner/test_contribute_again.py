"""An owner's one command, given again: the same documents go on, others are refused."""

import json
import shutil
from pathlib import Path

import pytest

from flexolmo_jax import cli
from flexolmo_jax.exchange.contribution import open_contribution


@pytest.fixture
def given(anchor: Path, corpora: dict[str, Path], tmp_path: Path, monkeypatch) -> Path:
    """A folder in which the command was given, and lost what it made."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(anchor, "anchor")
    shutil.copy(corpora["code"], "code.jsonl")
    assert cli.main(command("anchor", "code.jsonl", "c")) == 0
    shutil.rmtree("c")
    return tmp_path


def command(anchor: str, documents: str, out: str, *more: str) -> list[str]:
    words = ["contribute", "--anchor", anchor, "--documents", documents, "--name", "code"]
    settings = ("train.steps=2", "data.batch_size=8", "mesh.fsdp=1")
    return [*words, *(w for one in settings for w in ("--set", one)), "--out", out, *more]


def test_it_goes_on_from_another_folder_and_where_all_of_it_was_moved(given, monkeypatch, capfd):
    (given / "here").rename(given / "there")
    monkeypatch.chdir(given)
    (given / "there" / "code.jsonl").rename(given / "mine.jsonl")
    assert cli.main(command("./there/anchor/", str(given / "mine.jsonl"), "there/c")) == 0
    assert "resumes from step 2" in capfd.readouterr().err
    assert open_contribution(given / "there" / "c").name == "code"
    link = given / "link"
    link.symlink_to("there")
    again = command("link/anchor", "mine.jsonl", "d", "--work", "link/c.work")
    assert cli.main(again) == 0 and "resumes from step 2" in capfd.readouterr().err


def test_other_documents_at_the_same_path_are_refused_by_name(given, capfd):
    text = Path("code.jsonl").read_text()
    Path("code.jsonl").write_text(text + json.dumps({"text": "one more"}) + "\n")
    assert cli.main(command("anchor", "code.jsonl", "c")) == 2
    assert "c.work was made from other documents (edited: code.jsonl)" in capfd.readouterr().err
    Path("code.jsonl").write_text(text)
    Path("docs").mkdir()
    Path("code.jsonl").rename("docs/code.jsonl")
    Path("docs/more.jsonl").write_text(json.dumps({"text": "one more"}) + "\n")
    assert cli.main(command("anchor", "docs", "c")) == 2
    assert "(new: more.jsonl)" in capfd.readouterr().err
    assert not Path("c").exists()


def test_other_records_in_the_work_are_refused(given, prepared, capfd):
    """The index says what they were made from, which anybody may have copied."""
    index = json.loads((given / "here" / "c.work" / "data" / "index.json").read_text())
    shutil.rmtree("c.work/data")
    shutil.copytree(prepared["law"], "c.work/data")
    other = json.loads(Path("c.work/data/index.json").read_text())
    Path("c.work/data/index.json").write_text(json.dumps(other | {"inputs": index["inputs"]}))
    assert cli.main(command("anchor", "code.jsonl", "c")) == 2
    assert "data.train[0].path: " in capfd.readouterr().err
