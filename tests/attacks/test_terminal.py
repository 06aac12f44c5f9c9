"""Strangers' words on a terminal and on a page. The promise: they are shown, and have no effect."""

import json
import os
import pty
import re
import shutil
import sys
from pathlib import Path

import pytest

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.cli.printing import for_terminal
from flexolmo_jax.convert.card import model_card
from flexolmo_jax.errors import UserError, printable
from flexolmo_jax.runtime.progress import bar, note

ATTACKS = (
    "\x1b[2J\x1b[31m",
    "\u202egpj.exe",
    "a\nflexolmo: all is well",
    "\x07\x08\x9b31m",
    "\u2028next",
    "\ud800",
    "\u200b\u2066",
)
EVIL = "".join(ATTACKS)


def is_shown(text: str) -> bool:
    return all(c.isprintable() for line in text.splitlines() for c in line) and "\x1b" not in text


@pytest.mark.parametrize("text", ATTACKS)
def test_what_is_not_printable_is_spelled_out(text):
    """Escapes, line ends and marks that turn the direction of writing."""
    assert printable(f"a{text}b").isprintable() and printable(f"a{text}b") != f"a{text}b"
    assert str(UserError(f"got {text}")).isprintable()
    assert printable("x\n\ty\x1b", keep="\n\t") == "x\n\ty\\x1b"
    assert printable("Zürich 東京 naïve") == "Zürich 東京 naïve"


def test_notes_bars_and_errors_are_one_line_without_effect(tmp_path, capsys):
    """In names, paths, keys and errors."""
    note(f"reading {EVIL}")
    with bar(f"train {EVIL}", 10) as advance:
        advance(10, f"loss {EVIL}")
    told = capsys.readouterr().err
    assert is_shown(told) and len(told.splitlines()) == 2, told
    place = tmp_path / "\x1b[2Jmodel\nx"
    place.mkdir()
    (place / "flexolmo.json").write_text(json.dumps({EVIL[:5]: 1}))
    for arguments in (
        ["info", str(place)],
        ["verify", str(place)],
        ["eval", str(place), "--data", str(place)],
        ["info", "\x1b[2J"],
    ):
        assert cli.main(arguments) == 2
        told = capsys.readouterr().err
        assert is_shown(told) and len(told.splitlines()) == 1, told
    with pytest.raises(SystemExit):
        cli.main(["info", str(place), "\x1b[2Jmore"])
    assert is_shown(capsys.readouterr().err)


def test_what_a_verb_prints_of_strangers_words_has_no_effect(anchor, tmp_path, capsys):
    """A public document's name travels with an anchor, and `info` shows it."""
    from flexolmo_jax.description import write_description

    copy = Path(shutil.copytree(anchor, tmp_path / "anchor"))
    description = open_artifact(copy).description
    write_description(copy, description | {"public": ["\x1b[2J\u202eevil", "two\nlines"]})
    assert cli.main(["info", str(copy)]) == 0
    out = capsys.readouterr().out
    assert is_shown(out) and "evil" in out
    assert cli.main(["info", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["public"][1] == "two\nlines"


def test_a_models_escapes_take_no_effect_on_a_terminal(monkeypatch):
    """A completion goes to a file as it is, and to a terminal with its escapes spelled out."""
    said = "one\n\ttwo\x1b[2J"
    assert for_terminal(said) == said  # pytest's stdout is none
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert for_terminal(said) == "one\n\ttwo\\x1b[2J"
    os.close(master)


def test_a_model_card_has_no_markup_of_strangers(model):
    """Names, owners, licences and a fingerprint once reached the Hub's page as HTML and links."""
    artifact = open_artifact(model)
    evil = (
        "<img src=x onerror=alert(1)> [free](https://evil.example) www.evil.example ![x](y) `z` |"
        " a@evil.example \n# Heading \x1b[2J"
    )

    def body(words: str) -> str:
        members = artifact.description["members"]
        members[0]["manifest"] |= dict.fromkeys(("owner", "domain", "licence"), words)
        members[0]["manifest"]["training"]["bits_per_byte"] = {
            who: {words: 1.5} for who in ("anchor", "pair")
        }
        artifact.description["fingerprint"] = words
        scores = {"bits_per_byte": {"with": {words: 1.25}}}
        return model_card(artifact, artifact.config, "bfloat16", -0.01, scores).split("---\n", 2)[2]

    plain, marked = body("a"), body(evil)
    assert not re.search(r"<img|\]\(|https?://|www\.|\x1b|@evil", marked)
    for mark in "#`|[<":  # of the card itself, and of the numbers of characters
        assert re.sub(r"&#\d+;", "", marked).count(mark) == plain.count(mark), mark
    assert len(marked.splitlines()) == len(plain.splitlines())
    assert marked.count("evil") >= 5 and "1.2500" in marked
