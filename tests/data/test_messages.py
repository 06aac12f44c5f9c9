"""Reading conversations: every format gives the same, all but training sees a text, and what is no
conversation is an error that names file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from flexolmo_jax.data.documents import (
    Document,
    digest_of,
    documents_in,
    read_documents,
    read_training_documents,
)
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.errors import UserError
from tests.chats import said

CHAT = said("Where is\n\nthe mill?", "", "And 東京?", "Far away.", system="Be brief.")
ROWS = [{"messages": CHAT}, {"text": "plain"}, {"messages": said("a", "b")}]
READ = ["Be brief.\n\nWhere is\n\nthe mill?\n\n\n\nAnd 東京?\n\nFar away.", "plain", "a\n\nb"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.name.endswith(".parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_conversation_is_a_document_and_its_text_is_what_is_said(tmp_path, suffix):
    both = {"text": None, "messages": None}  # as a table has them in every row
    path = write(tmp_path / f"a{suffix}", [both | row for row in ROWS])
    found = list(documents_in(path))
    assert [list(one.messages) for one in found] == [CHAT, [], said("a", "b")]
    assert [one.text for one in found] == list(read_documents(path)) == READ
    unit = "document" if suffix == ".parquet" else "line"
    assert [one.where for one in found] == [f"{path}, {unit} {n}" for n in (1, 2, 3)]


def test_a_table_may_have_conversations_alone_with_more_keys_that_are_null(tmp_path):
    rows = [{"messages": [one | {"name": None} for one in said("a", "b")], "id": 3}]
    assert list(read_documents(write(tmp_path / "a.parquet", rows))) == ["a\n\nb"]
    assert list(read_documents(write(tmp_path / "a.jsonl", rows))) == ["a\n\nb"]


def test_the_same_words_are_on_the_same_side_as_text_and_as_a_conversation(tmp_path):
    chats = [said(f"question {i}", f"answer {i}") for i in range(60)]
    as_messages = write(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    texts = list(read_documents(as_messages))
    as_text = write(tmp_path / "b.jsonl", [{"text": text} for text in texts])
    trained_on = list(read_training_documents(as_messages, 0.5))
    assert trained_on == list(read_training_documents(as_text, 0.5))
    assert 0 < len(trained_on) < len(texts) == len({digest_of(text) for text in texts})


def test_a_tokenizer_is_trained_on_what_is_said(tmp_path):
    chats = write(tmp_path / "a.jsonl", [{"messages": said("zyzzyva zyzzyva", "yes")}] * 9)
    tokenizer = train_tokenizer([chats], 300, tmp_path / "t.json", heldout=0)
    assert len(tokenizer.encode("zyzzyva")) == 1 < len(tokenizer.encode("assistant"))


def test_a_text_file_has_no_messages(tmp_path):
    (tmp_path / "a.txt").write_text(json.dumps(ROWS[0]))
    assert [one.messages for one in documents_in(tmp_path / "a.txt")] == [()]
    assert Document("a", "a.txt").messages == ()


USER = {"role": "user", "content": "a"}
BAD = [
    ({"messages": CHAT, "text": "x"}, 'it has "text" and "messages"; expected one of them'),
    ({"messages": []}, "messages are []; expected a list of at least one message"),
    ({"messages": "hello"}, "messages are 'hello'; expected a list"),
    ({"messages": {"role": "user"}}, "messages are {'role': 'user'}; expected a list"),
    ({"messages": ["hello"]}, "message 0 has 'hello'; expected a role and a content"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 1 has ['role']; expected a role and"),
    ({"messages": [{"from": "human", "value": "a"}]}, "message 0 has ['from', 'value']; expected"),
    ({"messages": [USER | {"tool_calls": [1]}]}, "message 0 has ['content', 'role', 'tool_calls']"),
    ({"messages": [USER | {"content": [{"text": "a"}]}]}, "message 0: its content is [{'text': 'a"),
    ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "message 1: character 0 of"),
    ({"messages": [USER, {"role": "model", "content": "b"}]}, "its messages are of 'model, user'"),
    ({"messages": None}, '"text" is a NoneType'),
    ({"conversations": CHAT}, 'the object has no "text" and no "messages"'),
]


@pytest.mark.parametrize(("row", "complaint"), BAD)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_what_is_no_conversation_is_named_with_its_line(tmp_path, suffix, row, complaint):
    path = write(tmp_path / f"bad{suffix}", [ROWS[0], row])
    with pytest.raises(UserError) as refused:
        list(read_documents(path))
    told = str(refused.value)
    assert told.startswith(f"{path}, line 2: ") and complaint in told
    assert told.isprintable() and len(told) < 400


def test_a_row_that_is_no_conversation_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [{"messages": CHAT}, {"messages": [USER]}])
    with pytest.raises(UserError, match=r"a\.parquet, document 2: its messages are of 'user'"):
        list(read_documents(path))
    path = write(tmp_path / "b.parquet", [{"body": "x"}])
    with pytest.raises(UserError, match='expected one named "text" or "messages"'):
        list(read_documents(path))
    path = write(tmp_path / "c.parquet", [{"messages": "x"}])
    with pytest.raises(UserError, match=r"c\.parquet, document 1: messages are 'x'"):
        list(read_documents(path))
