"""Packing: no token is lost or doubled, nothing that fits is split, and little room is wasted."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flexolmo_jax.data.packing import MAX_SEGMENTS, Packer, lay_out

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def pack(documents, seq_len, open_records):
    packer = Packer(seq_len, open_records)
    return [record for document in documents for record in packer.add(document)] + packer.flush()


def numbered(lengths):
    """Documents whose tokens all differ, so that a piece says where it comes from."""
    ends = np.cumsum(lengths, dtype=int)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@given(lengths=LENGTHS, seq_len=st.integers(1, 25), open_records=st.integers(1, 8))
def test_every_document_can_be_put_together_again_and_none_that_fits_is_split(
    lengths, seq_len, open_records
):
    documents = numbered(lengths)
    records = pack(documents, seq_len, open_records)
    pieces = Counter(tuple(piece) for record in records for piece in record)
    expected = Counter(
        tuple(d[start : start + seq_len]) for d in documents for start in range(0, len(d), seq_len)
    )
    assert pieces == expected
    assert all(0 < sum(map(len, record)) <= seq_len for record in records)


@given(lengths=LENGTHS, seq_len=st.integers(1, 25))
def test_a_record_laid_out_gives_its_pieces_back(lengths, seq_len):
    for record in pack(numbered(lengths), seq_len, 4):
        tokens, segments = lay_out(record, seq_len, pad_id=-1)
        assert tokens.shape == segments.shape == (seq_len,)
        assert segments.dtype == np.uint16
        for i, piece in enumerate(record, 1):
            assert tokens[segments == i].tolist() == piece.tolist()
        assert (tokens[segments == 0] == -1).all()
        assert (segments != 0).sum() == sum(map(len, record))


def test_records_are_nearly_full_on_mixed_lengths():
    lengths = np.random.default_rng(0).geometric(1 / 300, 5000).clip(2)
    records = pack(numbered(lengths), 1024, 256)
    assert lengths.sum() / (len(records) * 1024) > 0.99


def test_a_document_goes_where_it_fits_best():
    records = pack(numbered([6, 8, 2, 3, 9, 1, 1]), 10, 4)
    assert [[len(piece) for piece in record] for record in records] == [[8, 2], [6, 3, 1], [9, 1]]


def test_memory_is_bounded_by_the_open_records():
    packer = Packer(10, open_records=3)
    returned = sum(len(packer.add(np.zeros(6, int))) for _ in range(100))
    assert returned == 97
    assert len(packer.flush()) == 3


def test_a_record_never_holds_more_documents_than_segments_can_number():
    records = pack([np.zeros(1, int)] * (MAX_SEGMENTS + 1), MAX_SEGMENTS + 10, 4)
    assert sorted(map(len, records)) == [1, MAX_SEGMENTS]
