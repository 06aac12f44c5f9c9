"""Where commands are told to write. The promise: nothing of the user's is changed, and what is
there afterwards is whole."""

import os
import stat
from pathlib import Path

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage import files
from flexolmo_jax.storage.outputs import check_new
from tests.attacks.test_stores import everything


@pytest.fixture
def verbs(anchor, model, contributions, corpora, tmp_path) -> dict[str, list[str]]:
    """Commands that write one file, whose name comes last."""
    code, public = str(corpora["code"]), str(corpora["public"])
    return {
        ".pem": ["keygen"],
        ".npy": ["embed-domain", "--anchor", str(anchor), "--input", code, "--out"],
        ".jsonl": [
            "proxy",
            "--anchor",
            str(anchor),
            "--private",
            code,
            "--public",
            public,
            "--out",
        ],
        ".json": ["tokenizer", "train", "--input", public, "--vocab-size", "300", "--out"],
        "": [
            "screen",
            str(contributions["law"]),
            "--anchor",
            str(anchor),
            "--model",
            str(anchor),
            "--documents",
            code,
            "--out",
        ],
    }


def test_a_file_is_not_written_into_what_holds_exactly_its_own(
    verbs, anchor, model, contributions, capsys
):
    """Promise: nothing of the user's is changed. The anchor, model or contribution was refused by
    everybody from then on, and a private key could lie in what is handed over."""
    for place in (anchor / "public", model, contributions["law"]):
        before = everything(place)
        for suffix, arguments in verbs.items():
            assert main([*arguments, str(place / f"mine{suffix}")]) == 2
            assert "lies inside the" in capsys.readouterr().err.splitlines()[-1]
        assert everything(place) == before
    assert verify(anchor)["verified"] and verify(model)["verified"]


def test_a_file_takes_no_others_place(verbs, tmp_path, capsys):
    """Promise: nothing of the user's is changed: pipes and links that lead nowhere yet are
    somebody's too."""
    for suffix, arguments in verbs.items():
        pipe, link = tmp_path / f"pipe{suffix}", tmp_path / f"link{suffix}"
        os.mkfifo(pipe)
        link.symlink_to(tmp_path / f"elsewhere{suffix}")
        for path in (pipe, link):
            assert main([*arguments, str(path)]) == 2
            assert f"{path} exists" in capsys.readouterr().err.splitlines()[-1]
        assert (
            stat.S_ISFIFO(pipe.lstat().st_mode)
            and link.is_symlink()
            and not (tmp_path / f"elsewhere{suffix}").exists()
        )


def test_what_a_stopped_command_leaves_is_no_file_of_its_name(tmp_path, monkeypatch):
    """Promise: nothing is taken up but what is whole. Half a file of proxies once stayed, and the
    next tuning read it."""
    for operation in ("write", "sync", "rename"):

        def stop(what: str, path: Path, at: str = operation) -> None:
            if what == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(files, "observer", stop)
        with pytest.raises(KeyboardInterrupt):
            files.write_new(tmp_path / "new" / "proxies.jsonl", b"{}\n" * 100)
        assert everything(tmp_path / "new") == {}


@pytest.mark.parametrize("name", [".", "", "..", "/"])
def test_a_place_without_a_name_is_refused(
    verbs, anchor, model, contributions, corpora, tmp_path, monkeypatch, capsys, name
):
    """Promise: a user's mistake is one line. Some of these were a traceback, and `merge --out .`
    put a model in the place of the working directory and said that there was none."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, public = str(corpora["code"]), str(corpora["public"])
    directories = [
        ["merge", "--anchor", str(anchor), str(contributions["law"]), "--out"],
        [
            "contribute",
            "--anchor",
            str(anchor),
            "--documents",
            code,
            "--name",
            "x",
            "--set",
            "train.steps=1",
            "--out",
        ],
        [
            "tune",
            str(model),
            "--proxy",
            f"code={code}",
            "--public",
            public,
            "--set",
            "train.steps=1",
            "--out",
        ],
        ["export-hf", str(anchor)],
    ]
    del verbs[".json"]  # a tokenizer goes into an empty directory
    for arguments in [*verbs.values(), *directories]:
        assert main([*arguments, name]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        expected = ("exists", "working directory", "ends in .jsonl") if name else ("an empty path",)
        assert told.startswith("flexolmo: ") and any(part in told for part in expected), told
    assert list(Path.cwd().iterdir()) == [] and (tmp_path / "empty").samefile(".")
    with pytest.raises(UserError, match="working directory"):
        check_new(tmp_path / "empty")
