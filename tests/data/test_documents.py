"""Reading documents: every format gives the same text, and what cannot be read is an error that
names file and line."""

import builtins
import gzip
import json

import pytest

from flexolmo_jax.data.documents import document_files, has_documents, name_of, read_documents
from flexolmo_jax.errors import UserError

TEXTS = ["plain", "two\nlines\r\n", "naïve 東京 🙂\u2028still one line", "", "NUL \0 and tab\t"]


def as_jsonl(texts):
    return "".join(
        json.dumps({"id": 3, "text": text}, ensure_ascii=False) + "\n" for text in texts
    ).encode()


def write(path, texts):
    """Writes documents in the format that the name says."""
    if path.name.endswith(".parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(
            pyarrow.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=2
        )
    elif path.name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        data = as_jsonl(texts)
        middle = len(data) // 2  # two frames, as appending to a file makes them
        path.write_bytes(zstandard.compress(data[:middle]) + zstandard.compress(data[middle:]))
    else:
        path.write_bytes(
            gzip.compress(as_jsonl(texts)) if path.name.endswith(".gz") else as_jsonl(texts)
        )
    return path


def error_of(path):
    with pytest.raises(UserError) as error:
        list(read_documents(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_documents_and_accounts_for_every_byte(tmp_path, suffix):
    path = write(tmp_path / f"corpus{suffix}", TEXTS)
    steps = []
    assert list(read_documents(path, steps.append)) == TEXTS
    assert sum(steps) == pytest.approx(path.stat().st_size, abs=5)
    assert name_of(path) == "corpus"


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo é".encode())
    assert list(read_documents(tmp_path / "a.txt")) == ["one\r\n\ntwo é"]


def test_a_directory_stands_for_its_files_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl", ["b"])
    write(tmp_path / "a.jsonl.gz", ["a"])
    write(tmp_path / "sub" / "c.jsonl", ["c"])
    write(tmp_path / ".hidden.jsonl", ["hidden"])
    (tmp_path / "README.md").write_text("not a document")
    assert list(read_documents(tmp_path)) == ["a", "b", "c"]
    assert has_documents(tmp_path)


def test_a_byte_order_mark_blank_lines_and_a_missing_last_line_end_are_no_mistakes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n\n  \r\n{"text": "y"}')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{oops", "not JSON"),
        (b'{"text": "x"} {"text": "y"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"x"', "got a JSON str"),
        (b'{"body": "x"}', 'no "text"'),
        (b'{"text": 3}', '"text" is a int'),
        (b'{"text": null}', '"text" is a NoneType'),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not Unicode"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_that_is_no_document_is_named(tmp_path, suffix, line, complaint):
    data = b'{"text": "fine"}\n\n' + line + b"\n"
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    message = error_of(path)
    assert f"bad{suffix}, line 3: " in message
    assert complaint in message


def test_invalid_utf8_in_a_text_file_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    assert "a.txt, line 3: not UTF-8" in error_of(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_truncated_file_is_an_error_not_a_shorter_corpus(tmp_path, suffix):
    path = write(tmp_path / f"cut{suffix}", [f"document {i * 7919}" for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-20])
    assert "is the file complete?" in error_of(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, suffix):
    (tmp_path / f"lie{suffix}").write_bytes(b'{"text": "not compressed"}\n')
    assert f"cannot read {tmp_path}/lie{suffix}" in error_of(tmp_path / f"lie{suffix}")


def test_parquet_without_strings_named_text_is_an_error(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    assert 'the columns body, id; expected one named "text"' in error_of(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "b.parquet")
    assert 'b.parquet, document 2: "text" is a NoneType' in error_of(tmp_path / "b.parquet")
    columns = [pyarrow.array(["x"]), pyarrow.array(["y"])]
    twice = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    parquet.write_table(twice, tmp_path / "c.parquet")
    assert 'the columns text, text; expected one named "text"' in error_of(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("suffix", "package"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, suffix, package):
    path = write(tmp_path / f"a{suffix}", ["x"])
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert f"pip install {package}" in error_of(path)


def test_missing_unknown_and_empty_paths_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, complaint in [
        ("nowhere.jsonl", "does not exist"),
        ("a.csv", "unknown kind"),
        ("empty", "holds no documents"),
    ]:
        for function in (read_documents, document_files, has_documents):
            with pytest.raises(UserError, match=complaint):
                function(tmp_path / name)


def test_a_prepared_directory_is_told_from_documents(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    assert not has_documents(tmp_path)
