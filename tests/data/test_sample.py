"""What is taken where a limit takes a part, and what is scored of prepared documents."""

import json

import numpy as np
import pytest

from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import SPLITS, open_records
from flexolmo_jax.data.sample import sample_of, tell_heldout, tell_part
from flexolmo_jax.runtime.progress import note_once
from tests.chats import UNMARKED, byte_chat, said


@pytest.fixture(autouse=True)
def unsaid():
    """What other tests were told once is told here again."""
    note_once.cache_clear()


@pytest.mark.parametrize(
    ("total", "limit"), [(1203, 64), (7, 3), (5, 5), (5, 9), (0, 4), (3, None)]
)
def test_a_sample_is_spread_evenly_over_all(total, limit):
    chosen = list(sample_of(total, limit))
    assert len(chosen) == (total if limit is None else min(total, limit))
    if total:
        gaps = np.diff([*chosen, total])
        assert chosen[0] == 0 and gaps.max() - gaps.min() <= 1 and gaps.min() > 0


def test_a_part_is_told_once_and_the_whole_is_not(capfd):
    for taken in (64, 64, 1203):
        tell_part(taken, 1203, "a set of this test")
    assert capfd.readouterr().err == (
        "a set of this test: 64 of 1,203 records are scored, a sample spread evenly over them\n"
    )


@pytest.mark.parametrize("conversations", [0, 30])
def test_both_splits_are_read_as_one(conversations, tmp_path, capfd):
    rows = [{"text": f"the mill {i} " * (i % 5 + 1)} for i in range(60)]
    chats = ({"messages": said(f"where is {i}?", f"answer {i}")} for i in range(200))
    rows += list(chats)[:conversations]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([tmp_path / "docs.jsonl"], byte_chat("chatml", UNMARKED), 96, tmp_path / "docs",
            heldout=0.3)  # fmt: skip
    train, heldout = (open_records(tmp_path / "docs", split) for split in SPLITS)
    whole = open_records(tmp_path / "docs", "all")
    assert len(whole) == len(train) + len(heldout) and whole.stats.documents == len(rows)
    assert whole.stats.scored_bytes == train.stats.scored_bytes + heldout.stats.scored_bytes
    assert whole.conversations == conversations and whole.content == train.content
    for place, record in ((0, train[0]), (len(train), heldout[0])):
        assert whole[place].keys() == record.keys() | ({"context"} if conversations else set())
        assert all((whole[place][key] == record[key]).all() for key in record)

    tell_heldout(whole, "docs of this test")
    assert "those held out" not in capfd.readouterr().err
    tell_heldout(heldout, "docs of this test")
    told = f"docs of this test: {heldout.stats.documents} of {len(rows)} documents are scored"
    assert told in capfd.readouterr().err
