"""What a record is: where its text is, what is left out of a file, and where documents end."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import LONGEST, documents_in, read_documents
from flexolmo_jax.data.formats import Tally
from flexolmo_jax.errors import UserError

ROWS = [{"id": i, "body": f'a {i}\n"b", c\td'} for i in range(5)]
TEXTS = [row["body"] for row in ROWS]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the name says."""
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=",\t"[path.suffix == ".tsv"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **how: Any) -> list[str]:
    return list(read_documents(path, reading=Reading(**how)))


def refused(path: Path, **how: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_another_key_or_column_may_hold_the_text(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ROWS)
    assert read(path, text_key="body") == TEXTS
    told = refused(path)
    assert "a" + suffix in told and "body" in told and "--text-key" in told


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_dot_leads_into_an_object_unless_a_key_has_it(tmp_path, suffix):
    nested = write(tmp_path / f"a{suffix}", [{"meta": {"text": "inner"}, "id": 1}])
    flat = write(tmp_path / f"b{suffix}", [{"meta.text": "flat", "id": 1}])
    assert read(nested, text_key="meta.text") == ["inner"]
    assert read(flat, text_key="meta.text") == ["flat"]
    assert 'no "meta.no"' in refused(nested, text_key="meta.no")


def test_a_table_may_hold_lines_quotes_and_large_fields(tmp_path):
    large = "word, " * 100_000
    rows = [{"text": "a\r\nb\n"}, {"text": 'say "x"'}, {"text": large}, {"text": "\0"}]
    for suffix in (".csv", ".tsv"):
        path = write(tmp_path / f"a{suffix}", rows)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read(path) == [row["text"] for row in rows]
    where = [one.where.rpartition(", ")[2] for one in documents_in(tmp_path / "a.csv")]
    assert where == ["line 2", "line 5", "line 6", "line 7"]


def test_a_table_without_its_end_or_with_two_columns_of_text_is_refused(tmp_path):
    (path := tmp_path / "a.csv").write_text('id,text\n1,"cut')
    assert "line 2: a field in quotes does not end" in refused(path, skip_bad=True)
    path.write_text("text,text\na,b\n")
    assert "the columns 'text, text'; expected one named 'text'" in refused(path)
    path.write_text("title\tbody\na\tb\n")
    assert "unknown kind" in refused(path)


def test_a_json_file_is_a_list_or_one_record_or_a_record_each_line(tmp_path):
    one = {"text": 'a ] } " , [', "more": [[1, {"x": "]"}], None]}
    path = tmp_path / "a.json"
    for content in (
        json.dumps(one),
        json.dumps(one, indent=2),
        json.dumps([one]),
        f"\n [ {json.dumps(one, indent=2)}\n]\n",
        "\ufeff" + json.dumps([one]),
    ):
        path.write_text(content, "utf-8")
        assert read(path) == [one["text"]], content
    path.write_text(json.dumps(one) + "\n\n" + json.dumps(one) + "\n")
    assert read(path) == 2 * [one["text"]]
    path.write_text("[]")
    assert read(path) == []


def test_a_json_file_of_another_form_is_refused_in_a_line(tmp_path):
    path = tmp_path / "a.json"
    for content, complaint in (
        ({"data": [{"text": "x"}]}, 'no "text" and no "messages" (but \'data\')'),
        (["x"], "record 1: got a JSON str"),
        (3, "got a JSON int"),
    ):
        path.write_text(json.dumps(content))
        assert complaint in refused(path)
    for content, complaint in (
        ('[{"text": "a"}, {"text": "b', "it ends inside a list; is the file complete?"),
        ('[{"text": "a"}, {"text": "b"}', "it ends inside a list; is the file complete?"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "something is wrong where its list of records ends"),
        ('[{"text": "a"}}', "something is wrong where its list of records ends"),
        ('[{"text": "a"},\n{"text" "b"}]', "line 2, record 2: not JSON"),
    ):
        path.write_text(content)
        assert complaint in refused(path)


def test_a_long_list_is_read_element_by_element(tmp_path, monkeypatch):
    monkeypatch.setattr("flexolmo_jax.data.formats._CHUNK", 7)
    rows = [{"text": f'{i} \\" ]' * i, "x": [{}, [i]]} for i in range(40)]
    (path := tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    found = list(documents_in(path))
    assert [one.text for one in found] == [row["text"] for row in rows]
    lines = path.read_text().split("\n")
    for one in found:
        assert lines[int(one.where.split("line ")[1].split(",")[0]) - 1] == " {"


BAD = {
    "null": {"text": None},
    "a number": {"text": 3},
    "no key": {"body": "x"},
    "half a pair": {"text": "\ud800"},
    "both": {"text": "a", "messages": [{"role": "user", "content": "a"}]},
    "no answer": {"messages": [{"role": "user", "content": "a"}]},
}


def test_bad_records_are_left_out_counted_and_told_when_asked(tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    bad = [json.dumps(row) for row in BAD.values()] + ['{"text": "cut', "[1]", "3", '"x"']
    lines = [json.dumps({"text": "first"}), *bad, json.dumps({"text": "last"})]
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    tally = Tally()
    found = documents_in(path, None, Reading(skip_bad=True), tally)
    assert [one.text for one in found] == ["first", "last"]
    assert tally.bad == len(bad) + 1 and tally.first_bad.startswith(f"{path}, line 2: ")
    assert read(path, skip_bad=True) == ["first", "last"]
    told = capfd.readouterr().err
    assert f"{path}: left out {len(bad) + 1} records that are no documents; the first: " in told


@pytest.mark.parametrize("name", BAD)
def test_without_it_the_error_names_file_line_what_was_got_and_both_options(tmp_path, name):
    (path := tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + json.dumps(BAD[name]) + "\n")
    told = refused(path)
    assert told.startswith(f"{path}, line 2: ")
    assert "--text-key (data.text_key)" in told and "--skip-bad (data.skip_bad)" in told


@pytest.mark.parametrize(
    ("text_key", "record"),
    [
        ("text", '{"text": "old", "text": "new"}'),
        ("body.text", '{"body": {"text": "old"}, "body": {"text": "new"}}'),
        ("text", '{"messages": [{"role": "assistant", "content": "old", "content": "new"}]}'),
    ],
)
def test_a_text_that_stands_twice_in_a_record_is_told_and_other_keys_may(
    tmp_path, text_key, record
):
    (path := tmp_path / "a.jsonl").write_text(record + "\n")
    assert 'line 1: it has "' in (told := refused(path, text_key=text_key)) and "twice" in told
    assert read(path, text_key=text_key, skip_bad=True) == []
    path.write_text('{"text": "a", "id": 1, "id": 2, "meta": {"k": 1, "k": 2}}\n')
    assert read(path) == ["a"]


def test_bad_rows_of_tables_and_lists_are_left_out_too(tmp_path):
    (path := tmp_path / "a.csv").write_bytes(b'id,text\n1,a\n2\n3,\xff\n4,"x"y\n5,e,f\n6,b\n')
    assert read(path, skip_bad=True) == ["a", "b"]
    assert "line 3: got 1 fields; expected 2" in refused(path)
    (path := tmp_path / "a.json").write_text(
        '[{"text": "a"}, {"text": null}, {oops}, {"text": "b"}]'
    )
    assert read(path, skip_bad=True) == ["a", "b"]
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    assert read(write(tmp_path / "a.parquet", rows), skip_bad=True) == ["a", "b"]


def test_a_broken_first_line_does_not_hide_the_others(tmp_path):
    (path := tmp_path / "a.json").write_text('{"text": "cut\n{"text": "a"}\n{"text": "b"}\n')
    assert read(path, skip_bad=True) == ["a", "b"]
    assert "line 1: not JSON" in refused(path)


def test_a_text_file_is_split_at_lines_that_end_a_document(tmp_path, capfd):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"one\ntwo\n<|endoftext|>\n\n<|endoftext|>\r\nthree\r\n <|endoftext|> \nfour\n"
    )
    assert read(path) == ["one\ntwo", "three", "four"]
    assert "3 documents of .txt files end at a line <|endoftext|>" in capfd.readouterr().err
    assert [one.where for one in documents_in(path)][1] == f"{path}, line 6"
    assert read(path, separator="") == [path.read_bytes().decode()]
    assert read(path, separator="two") == ["one", path.read_bytes().decode()[8:].removesuffix("\n")]


def test_what_only_looks_like_an_end_is_text_and_told(tmp_path, capfd):
    path = tmp_path / "a.txt"
    path.write_text("a <|endoftext|> b\n</s>\nc\n")
    assert read(path) == [path.read_text()]
    assert "1 lines are </s>, and are learnt as text" in capfd.readouterr().err
    assert read(path, separator="</s>") == ["a <|endoftext|> b", "c"]


def test_a_text_file_may_be_longer_than_its_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("flexolmo_jax.data.formats.LONGEST", 100)
    text = "word " * 15
    (path := tmp_path / "a.txt").write_text(f"{text}\n<|endoftext|>\n" * 50)
    assert read(path) == [text] * 50
    assert "has more than 100 bytes in one document" in refused(path, separator="")
    assert LONGEST > 100


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_by_name_and_utf_8_with_a_mark_is_read(tmp_path, suffix, encoding):
    content = {".txt": "ab cd", ".csv": "text\nab cd\n"}.get(suffix, '{"text": "ab cd"}')
    (path := tmp_path / f"a{suffix}").write_bytes(content.encode(encoding))
    assert "is UTF-16; expected UTF-8" in refused(path, skip_bad=True)
    path.write_text(content, "utf-8-sig")
    assert read(path) == ["ab cd"]


def test_files_joined_with_their_marks_are_read(tmp_path):
    line = '{"text": "a"}\n'.encode("utf-8-sig")
    (path := tmp_path / "a.jsonl").write_bytes(line + line)
    assert read(path) == ["a", "a"]


def test_a_row_of_a_table_is_bounded(tmp_path):
    (path := tmp_path / "a.csv").write_bytes(b"text\n" + b",\n" * 2 + b"," * 5_000_000)
    assert "its record has more than" in refused(path, skip_bad=True)
