"""Directories of documents: nothing that is there is left out silently, nothing hidden is read."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.config import FORMATS, Reading
from flexolmo_jax.data.documents import document_files, found_in, name_of, read_documents
from flexolmo_jax.data.prepare import open_data, prepare, prepare_cached
from flexolmo_jax.data.records import Index, LeftOut
from flexolmo_jax.data.tokens import TokenRecords, has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import note_once


@pytest.fixture(autouse=True)
def told_again():
    note_once.cache_clear()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two documents, and much else."""
    folder = tmp_path / "docs"
    for place in (".git/objects", ".ipynb_checkpoints", "deep/.Trash-0", "sub", "../elsewhere"):
        (folder / place).mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "sub" / "b.txt").write_text("b")
    for name in (
        ".git/objects/x.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "deep/.Trash-0/x.jsonl",
        "sub/._b.txt",
        ".DS_Store",
        "../elsewhere/c.txt",
        "paper.pdf",
        "README",
    ):
        (folder / name).write_text("private")
    (folder / "package.json").write_text('{"name": "x", "version": "1"}')
    (folder / "scores.csv").write_text("id,score\n1,2\n")
    (folder / "empty.jsonl").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    return folder


LEFT_OUT = {
    "hidden": (5, [".DS_Store", ".git/", ".ipynb_checkpoints/", ".Trash-0/", "._b.txt"]),
    "of another kind": (2, ["README", "paper.pdf"]),
    "empty": (1, ["empty.jsonl"]),
    "broken links": (1, ["gone.jsonl"]),
    "links to folders": (1, ["link"]),
    "without documents": (2, ["package.json", "scores.csv"]),
    "no regular files": (1, ["pipe.jsonl"]),
}


def test_what_is_no_document_is_left_out_named_and_counted(folder, capfd):
    assert list(read_documents(folder)) == ["a", "b"]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{folder}: left out ") and "--strict" in line
    for why, (count, names) in LEFT_OUT.items():
        assert f"{count} {why} ({', '.join(names)})" in line
    list(read_documents(folder))
    assert capfd.readouterr().err == ""  # once a command


def test_the_prepared_data_say_what_was_left_out(folder, tokenizer, tmp_path):
    prepare([folder], tokenizer, 16, tmp_path / "out", heldout=0)
    index = Index.read(tmp_path / "out")
    assert {one.why: (one.count, one.names) for one in index.left_out} == LEFT_OUT
    assert [file.name for file in index.inputs] == ["a.jsonl", "empty.jsonl", "b.txt"]
    assert "checkpoint.txt" not in (tmp_path / "out" / "index.json").read_text()


def test_data_of_documents_alone_have_the_index_of_earlier_versions(tokenizer, tmp_path):
    (path := tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    prepare([path], tokenizer, 16, tmp_path / "out", heldout=0)
    fields = json.loads((tmp_path / "out" / "index.json").read_text())
    assert fields.keys().isdisjoint({"text_key", "separator", "bad_removed", "left_out"})


def test_strict_makes_it_an_error(folder, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"holds 5 hidden .*take these out, or leave out --strict"):
        document_files(folder, Reading(strict=True))
    tokenizer.save(tmp_path / "t.json")
    how = ["--tokenizer", tmp_path / "t.json", "--seq-len", 16, "--out", tmp_path / "out"]
    command = ["data", "prepare", "--input", folder, *how, "--strict"]
    assert main([str(word) for word in command]) == 2
    assert not (tmp_path / "out").exists()
    for inside in folder.iterdir():
        if inside.name != "a.jsonl":
            inside.rename(tmp_path / f"moved {inside.name}")
    assert document_files(folder, Reading(strict=True)) == [folder / "a.jsonl"]


def test_a_hidden_path_that_is_named_is_read(folder):
    assert list(read_documents(folder / ".git")) == ["private"]
    assert list(read_documents(folder / "sub" / "._b.txt")) == ["private"]
    (home := folder.parent / ".corpora" / "mine").mkdir(parents=True)
    (home / "a.txt").write_text("a")
    assert list(read_documents(home)) == ["a"]


def test_hidden_folders_of_token_files_are_not_read(tmp_path, tokenizer):
    (tmp_path / ".old").mkdir()
    for name in ("a.bin", ".old/b.bin"):
        np.arange(16, dtype=np.uint32).tofile(tmp_path / name)
    assert has_tokens(tmp_path)
    assert len(TokenRecords(tmp_path, tokenizer, 8)) == 2


def test_a_folder_that_cannot_be_listed_is_told(folder, monkeypatch):
    """As root, tests may list every folder: the system's answer is put in."""
    (folder / "closed").mkdir()
    real = os.scandir

    def closed(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert ("unreadable", "closed/") in found_in(folder).left_out


def test_a_file_that_may_not_be_read_is_told(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: not os.fspath(path).endswith("a.jsonl"))
    found = found_in(folder)
    assert ("unreadable", "a.jsonl") in found.left_out
    assert [file.name for file in found.files] == ["empty.jsonl", "b.txt"]


def test_a_file_is_known_by_its_content_where_its_name_tells_nothing(tmp_path):
    for name, content in (
        ("part-00000", '{"text": "a"}\n{"text": "b"}\n'),
        ("list", '[{"text": "c"}]'),
        ("notes", "no documents"),
        ("badge", "[x](y)"),
    ):
        (tmp_path / name).write_text(content)
    assert list(read_documents(tmp_path)) == ["c", "a", "b"]
    (named := tmp_path / "corpus.v2").write_text('{"text": "a"}\n')
    assert list(read_documents(named)) == ["a"]
    assert ("of another kind", "corpus.v2") in found_in(tmp_path).left_out
    for name in ("notes", "badge"):
        with pytest.raises(UserError, match="unknown kind"):
            read_documents(tmp_path / name)


def test_a_packed_file_that_is_cut_short_is_not_taken_for_another_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    whole = gzip.compress(b'{"text": "b"}\n' * 1000)
    (tmp_path / "part-1.gz").write_bytes(whole)
    assert len(list(read_documents(tmp_path))) == 1001
    (tmp_path / "part-1.gz").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"cannot read .*part-1\.gz"):
        list(read_documents(tmp_path))


def test_a_file_of_documents_with_a_bad_first_record_is_not_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.ndjson").write_text('{"title": "no text"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"b\.ndjson, line 1"):
        list(read_documents(tmp_path))
    assert list(read_documents(tmp_path, reading=Reading(skip_bad=True))) == ["a", "b"]


def test_a_folder_without_documents_says_what_it_holds(tmp_path):
    (tmp_path / "paper.pdf").write_text("x")
    with pytest.raises(UserError, match=r"holds no documents: .*1 of another kind \(paper.pdf\)"):
        document_files(tmp_path)


def test_a_folder_whose_files_lack_the_key_says_which_key(tmp_path):
    (tmp_path / "notes.csv").write_text("id,note\n1,x\n")
    told = r'with a "text" inside it; left out: 1 without documents \(notes.csv\); --text-key'
    with pytest.raises(UserError, match=told):
        document_files(tmp_path)


def test_empty_files_of_every_kind_are_told_and_no_error(tmp_path, tokenizer):
    (folder := tmp_path / "docs").mkdir()
    (folder / "a.jsonl").write_text('{"text": "a b"}\n')
    names = [f"empty{suffix}" for suffix in (*FORMATS, ".jsonl.gz", ".json.zst")]
    for name in names:
        (folder / name).touch()
    index = prepare([folder], tokenizer, 16, tmp_path / "out", heldout=0)
    assert index.splits["train"].documents == 1
    assert index.left_out == [LeftOut("empty", len(names), sorted(names))]


def test_names_that_are_not_utf_8_are_written_so_that_the_index_is_read(tmp_path, tokenizer):
    folder = tmp_path / os.fsdecode(b"docs\xff")
    folder.mkdir()
    for name in (b"a\xe9.jsonl", b"\xff" * 200 + b".jsonl", b"b\xe9.pdf"):
        (folder / os.fsdecode(name)).write_text(json.dumps({"text": f"of {name!r}"}))
    out = folder / os.fsdecode(b"out\xff")
    index = prepare([folder], tokenizer, 16, out, heldout=0)
    assert Index.read(out) == index and index.name == "out\\xff"
    assert index.inputs[0].name == "a\\xe9.jsonl" and index.left_out[0].names == ["b\\udce9.pdf"]


def test_the_cache_knows_how_documents_were_read(tmp_path, tokenizer):
    (folder := tmp_path / "docs").mkdir()
    (folder / "a.txt").write_text("one\n---\ntwo\n")
    (folder / "b.jsonl").write_text('{"text": "x", "body": "y"}\n')
    ways = [Reading(), Reading(separator="---"), Reading(text_key="body"), Reading(strict=True)]
    places = {prepare_cached(folder, tokenizer, 16, tmp_path / "cache", way) for way in ways}
    assert len(places) == 3


def test_names_keep_their_dots_but_not_the_suffixes_of_documents(tmp_path):
    for name in ("wiki.en", "wiki.fr", "a.v2.jsonl", "a.v2.json.gz", "b.TXT.zstd", "c.gz"):
        (tmp_path / name).touch()
    names = [name_of(path) for path in sorted(tmp_path.iterdir())]
    assert names == ["a.v2", "a.v2", "b", "c.gz", "wiki.en", "wiki.fr"]
    (tmp_path / "notes.csv").with_suffix(".d").mkdir()
    assert name_of(tmp_path / "notes.d") == "notes.d"


def test_special_tokens_that_documents_spell_stay_text(tmp_path, tokenizer):
    """In every format: no text becomes the token that ends a document."""
    text = "a <|endoftext|> b\n<|pad|>\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "<|endoftext|>\n" + text}))
    for found in read_documents(tmp_path):
        ids = tokenizer.encode(found)
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert tokenizer.decode(ids) == found


def test_documents_beside_token_files_are_told(tmp_path, tokenizer, capfd):
    np.arange(32, dtype=np.uint16).tofile(tmp_path / "a.bin")
    (tmp_path / "b.csv").write_text("text\nb\n")
    assert isinstance(open_data(tmp_path, tokenizer, 8, "train"), TokenRecords)
    assert f"{tmp_path}: left out 1 of another kind (b.csv)" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"holds 1 of another kind \(b\.csv\)"):
        open_data(tmp_path, tokenizer, 8, "train", Reading(strict=True))
