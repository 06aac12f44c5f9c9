"""Mixed documents: half a record of text of each of two domains."""

from flexolmo_jax.data.records import open_records
from flexolmo_jax.evals.mixed import mixed_documents
from tests.tiny import SEQ_LEN


def test_they_are_of_a_sample_of_each_source_as_far_as_it_has_the_text(prepared, tiny_tokenizer):
    first, second = (open_records(prepared[name], "train") for name in ("code", "law"))
    every = mixed_documents(first, second, tiny_tokenizer, len(first) + len(second))
    few = mixed_documents(first, second, tiny_tokenizer, 4)
    assert len(few) == 4 < len(every)
    half = SEQ_LEN // 2
    starts = [record["tokens"][:half].tolist() for record in every]
    places = sorted(starts.index(record["tokens"][:half].tolist()) for record in few)
    assert places[0] < len(every) / 4 and places[-1] >= len(every) / 2
