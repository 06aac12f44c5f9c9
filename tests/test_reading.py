"""Every command that takes documents reads them in the same way, which options or a config say."""

import functools
import json
from pathlib import Path

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.cli.command import PARSER
from flexolmo_jax.config import DataConfig, Dataset, Reading, resolve
from flexolmo_jax.data.changes import changed_documents
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import Index
from flexolmo_jax.errors import UserError
from flexolmo_jax.owner.proxy_documents import Corpus, InProcess
from flexolmo_jax.train.sources import choose_tokenizer, open_sources
from tests.tiny import documents

BODY = Reading(text_key="body")
WAYS = ["--text-key", "body", "--separator=---", "--skip-bad", "--strict"]
COMMANDS = [
    "data prepare --input a --tokenizer t --seq-len 8 --out o",
    "tokenizer train --input a --vocab-size 300 --out o",
    "publish r --public a --out o",
    "embed-domain --anchor n --input a --out o",
    "proxy --anchor n --private a --public a --out o.jsonl",
    "screen c --anchor n --model m --documents a --out o.json",
    "extract m --documents a",
    "eval m --data a",
]


def with_bodies(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"body": text, "text": None}) + "\n" for text in texts))
    return path


@pytest.fixture
def bodies(tmp_path) -> Path:
    return with_bodies(tmp_path / "bodies.jsonl", documents("code", 160))


@pytest.mark.parametrize("command", COMMANDS)
def test_verbs_that_take_documents_take_how_they_are_read(command):
    args = PARSER.parse_args([*command.split(), *WAYS])
    assert (args.text_key, args.separator, args.skip_bad, args.strict) == (
        "body",
        "---",
        True,
        True,
    )
    args = PARSER.parse_args(command.split())
    assert Reading(args.text_key, args.separator, args.skip_bad, args.strict) == Reading()


def test_a_config_says_how_its_raw_documents_are_read(
    tmp_path, bodies, tiny_tokenizer, monkeypatch
):
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer.save(tmp_path / "t.json")
    keys = {
        "train": [{"path": str(bodies)}],
        "tokenizer": str(tmp_path / "t.json"),
        "batch_size": 2,
    }
    data = resolve({"data": keys | {"text_key": "body", "seq_len": 32}}).data
    assert data.reading == BODY
    open_sources(data, choose_tokenizer(data), 0)
    (made,) = (tmp_path / "cache").rglob("index.json")
    assert Index.read(made.parent).text_key == "body"
    plain = resolve({"data": keys | {"seq_len": 32}}).data
    with pytest.raises(UserError, match=r'"text" is a NoneType.*data\.text_key.*data\.skip_bad'):
        open_sources(plain, tiny_tokenizer, 0)


@pytest.mark.parametrize(
    ("key", "value"), [("text_key", ""), ("separator", "a\nb"), ("separator", " x")]
)
def test_what_can_be_no_key_and_no_line_is_refused(fails, tmp_path, key, value):
    option = f"--{key.replace('_', '-')}"
    command = ["--input", "a.jsonl", "--vocab-size", "300", "--out", tmp_path / "out" / "t"]
    assert option in fails("tokenizer", "train", *command, option, value)
    with pytest.raises(UserError, match=rf"data\.{key}"):
        DataConfig(train=(Dataset(path="a"),), **{key: value}).check()


def test_prepare_counts_what_it_leaves_out(tmp_path, tiny_tokenizer, capfd):
    tiny_tokenizer.save(tmp_path / "t.json")
    (docs := tmp_path / "docs").mkdir()
    with_bodies(docs / "a.jsonl", ["one", "two", "three"])
    (docs / "b.jsonl").write_text('{"body": null}\n{"body": 3}\n{"body": "four"}\n')
    (docs / "c.pdf").write_text("x")
    where = ["--input", docs, "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "out"]
    command = ["data", "prepare", *where, "--seq-len", 16, "--heldout", 0, *WAYS[:2], "--skip-bad"]
    assert main([str(word) for word in [*command, "--json"]]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (result["train"]["documents"], result["bad_removed"]) == (4, 2)
    assert result["left_out"] == [{"why": "of another kind", "count": 1, "names": ["c.pdf"]}]
    assert f"left out 2 records that are no documents; the first: {docs / 'b.jsonl'}, line 1" in err
    assert Index.read(tmp_path / "out").bad_removed == 2
    assert err.count("c.pdf") == 1


def test_an_owner_goes_on_with_records_of_the_same_documents_read_in_the_same_way(
    bodies, tmp_path, tiny_tokenizer
):
    prepare([bodies], tiny_tokenizer, 32, tmp_path / "data", reading=BODY)
    changes = functools.partial(changed_documents, tmp_path / "data", [bodies])
    assert changes(BODY) == changes(Reading(text_key="body", strict=True)) == ""
    assert changes(Reading()) == "text_key was 'body', now 'text'"
    assert changes(Reading(text_key="body", separator="---")).startswith("separator was")


def test_private_and_public_documents_may_have_their_texts_under_other_keys(bodies, corpora):
    both = InProcess(Corpus([bodies], BODY), Corpus([corpora["public"]]), 0.05)
    counted = both.count(1000)
    assert counted.private > 100 and counted.public > 100 and counted.both == 0
    (text,) = both.texts(counted.private_digests[:1], private=True)
    assert text.startswith("code ")


def test_names_of_data_keep_their_dots():
    """But not the suffixes of files of documents and tokens."""
    names = {
        "wiki.en": "wiki.en",
        "data/wiki.fr/": "wiki.fr",
        "a.v2.jsonl.gz": "a.v2",
        "A.JSONL.ZSTD": "A",
        "b.txt": "b",
        "tokens.v1.npy": "tokens.v1",
        ".hidden": ".hidden",
        "gs://bucket/books.2024": "books.2024",
    }
    assert {path: Dataset(path=path).title for path in names} == names


def test_a_models_verbs_give_the_same_of_text_under_another_key(
    anchor, bodies, corpora, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    found = {}
    for path, way in ((corpora["code"], []), (bodies, WAYS[:2])):
        assert main(["eval", str(anchor), "--data", str(path), *way, "--json"]) == 0
        (bits,) = json.loads(capfd.readouterr().out)["bits_per_byte"].values()
        row = tmp_path / f"{path.stem}.npy"
        where = ["--anchor", str(anchor), "--input", str(path), "--out", str(row)]
        assert main(["embed-domain", *where, *way]) == 0
        capfd.readouterr()
        found[path] = bits, row.read_bytes()
    assert found[bodies] == found[corpora["code"]]
