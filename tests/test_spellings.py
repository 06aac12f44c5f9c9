"""Paths as users write them: every verb takes each spelling, and every legal character."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flexolmo_jax import cli
from tests.tiny import Paths

ODD = "-lr[0.1] *?%s#{x}é\n~"  # one name with all that shells, URLs and patterns make something of


@pytest.fixture
def run(capfd) -> Callable[..., dict]:
    def run(verb: str, *words: str) -> dict:
        capfd.readouterr()
        status = cli.main([*verb.split(), *words, "--json"])
        out, err = capfd.readouterr()
        assert status == 0, f"{verb} {words}: {err}"
        return json.loads(out)

    return run


@pytest.fixture
def place(paths: Paths, tmp_path: Path) -> Path:
    """A folder whose name is odd, with one of everything that verbs take."""
    found = tmp_path / ODD
    shutil.copytree(paths.anchor, found / "anchor")
    shutil.copytree(paths.run, found / "run")
    shutil.copytree(paths.data, found / "data")
    for contribution in paths.contributions:
        shutil.copytree(contribution, found / contribution.name)
    shutil.copy(paths.public, found / "public.jsonl")
    shutil.copy(paths.code, found / "code.jsonl")
    shutil.copy(paths.config, found / "run.yaml")
    return found


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("absolute", "here", "home", "link")]


def text(path: str) -> str:
    """A path as a value of YAML."""
    return json.dumps(path)


@pytest.fixture(params=["parent", *SLOW])
def spelled(request, place, tmp_path, monkeypatch) -> Callable[[str], str]:
    """How a path in that folder is written."""
    (tmp_path / "aside" / "inner").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("FLEXOLMO_CACHE", "~/cache")
    (tmp_path / "link").symlink_to(place)
    (place / "sub").mkdir()
    (place / "into").symlink_to(place / "sub")
    folder, start = {
        "absolute": (tmp_path, f"{place}/"),
        "parent": (place / "sub", "../"),
        "here": (place, "./"),
        "home": (tmp_path, "~/"),
        # what is above the folder that the link leads to, not the link
        "link": (tmp_path, f"{tmp_path}/link/into/../"),
    }[request.param]
    monkeypatch.chdir(folder)
    return lambda name: f"{start}{name}"


def test_every_verb_takes_every_spelling_of_a_path(run, spelled, place):
    at = spelled

    def out(name: str) -> str:
        return f"--out={at(name)}"

    public, code, anchor = at("public.jsonl"), at("code.jsonl"), at("anchor")
    once = ("--set", "train.steps=1", "--set", "data.batch_size=8")
    sources = f"[{{path: {text(at('records'))}, name: a}}, {{path: {text(public)}}}]"
    of_run = ("--set", f"data.train={sources}", "--set", f"data.tokenizer={text(anchor)}")
    of_public = ("--set", f"pair.public={text(at('data'))}")
    store = f"--store={at('store')}"
    run("tokenizer train --vocab-size 300 --input", public, out("tokenizer.json"))
    run("data prepare --seq-len 32 --tokenizer", anchor, "--input", public, out("records"))
    run("train", at("run.yaml"), *once, *of_run, "--set", "model.vocab_size=384", out("new-run/"))
    assert (place / "new-run" / "summary.json").exists()
    run("eval", at("new-run"), "--data", at("records"), code)
    run("publish", at("new-run"), "--public", public, out("published"))
    run("verify", anchor)
    run("verify", at("code"), "--anchor", anchor)
    new = ("--documents", code, "--anchor", anchor)
    run("contribute --name new", *new, *once, *of_public, out("new"))
    run("merge --anchor", anchor, at("code"), at("law"), out("model"))
    run("append", at("model"), at("new"), store, out("appended"))
    run("opt-out --expert new", at("appended"), store, out("left"))
    run("verify", at("left"))
    run("export-hf --drop-bias", at("model"), at("hf"))
    run("import-hf", at("hf"), at("imported"))
    run("embed-domain --anchor", anchor, "--input", code, out("e.npy"))
    run("tune", at("model"), "--public", public, f"--proxy=code={code}", *once, out("tuned"))
    run("keygen", at("key"))
    run("gc", at("store"))
    assert run("info", at("tuned"))["kind"] == "model"
