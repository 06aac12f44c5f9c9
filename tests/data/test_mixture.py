"""Mixtures: a batch is a function of (seed, step), whatever the processes; shares match weights;
epochs are complete."""

import threading
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo_jax.data import mixture as module
from flexolmo_jax.data.mixture import Batches, mixture
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.errors import UserError

T = 16


@pytest.fixture(scope="session")
def make_records(tmp_path_factory, write_jsonl, tokenizer):
    """`make_records(count, mark)`: a source of `count` records, each of one document that starts
    with `mark` and its number."""

    def make(count, mark, seq_len=T, tokenizer=tokenizer):
        folder = tmp_path_factory.mktemp("source")
        # one fills a record with its EOS, or nearly
        full = [f"{mark}{i} ".ljust(seq_len - 1, "\x01") for i in range(count)]
        prepare(
            [write_jsonl(folder / "a.jsonl", full)], tokenizer, seq_len, folder / mark, heldout=0
        )
        records = open_records(folder / mark, "train")
        assert len(records) == len(origin(records)) == count
        return records

    return make


@pytest.fixture(scope="session")
def sources(make_records):
    return [(make_records(37, "a"), 1.0), (make_records(11, "b"), 2.0), (make_records(5, "c"), 0.5)]


def same(one, other):
    assert one.keys() == other.keys() == {"tokens", "segments", "source"}
    return all((one[key] == other[key]).all() for key in one)


def keys_of(batches, steps):
    return [record.tobytes() for step in steps for record in batches.at(step)["tokens"]]


def origin(records):
    return {records[i]["tokens"].tobytes() for i in range(len(records))}


def test_a_batch_has_these_shapes_and_types(sources):
    batch = mixture(sources, 12, seed=0).at(3)
    assert {key: array.shape for key, array in batch.items()} == {
        "tokens": (12, T),
        "segments": (12, T),
        "source": (12,),
    }
    assert all(array.dtype == np.int32 for array in batch.values())


def test_every_record_names_the_source_it_came_from(sources):
    batches = mixture(sources, 12, seed=0)
    for step in range(4):
        batch = batches.at(step)
        for tokens, source in zip(batch["tokens"], batch["source"], strict=True):
            assert tokens.tobytes() in origin(sources[source][0])


@given(
    step=st.integers(0, 10**7),
    seed=st.integers(0, 2**40),
    processes=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_any_number_of_processes_sees_the_same_global_batch(sources, step, seed, processes):
    batches = mixture(sources, 12, seed)
    parts = [
        batches.at(step, range(12)[i * 12 // processes : (i + 1) * 12 // processes])
        for i in range(processes)
    ]
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    assert same(whole, batches.at(step))


def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(sources):
    whole = list(islice(mixture(sources, 6, seed=4).iterate(), 20))
    resumed = mixture(sources, 6, seed=4).iterate(14)
    assert all(same(next(resumed), batch) for batch in whole[14:])


def test_iterating_gives_those_records_of_the_steps_batches_that_a_process_needs(sources):
    batches = mixture(sources, 6, seed=4)
    for step, batch in enumerate(islice(batches.iterate(5, [1, 4, 5]), 8), 5):
        assert same(batch, {key: values[[1, 4, 5]] for key, values in batches.at(step).items()})


def test_one_epoch_of_one_source_shows_every_record_once_and_the_next_in_another_order(sources):
    records = sources[0][0]
    batches = mixture(sources[:1], 1, seed=0)
    epochs = [keys_of(batches, range(e * len(records), (e + 1) * len(records))) for e in range(3)]
    assert all(sorted(epoch) == sorted(origin(records)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeds_give_different_orders_and_one_seed_always_the_same(sources):
    orders = [keys_of(mixture(sources, 5, seed), range(10)) for seed in (0, 1, 2, 0)]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_large_sources_keep_the_same_promises(sources, monkeypatch):
    # as if they were: shuffled by Grain's index shuffle, not by a permutation
    monkeypatch.setattr(module, "_FEW", 0)
    test_one_epoch_of_one_source_shows_every_record_once_and_the_next_in_another_order(sources)
    test_seeds_give_different_orders_and_one_seed_always_the_same(sources)


def test_the_same_corpus_named_twice_comes_in_two_orders(sources):
    records = sources[0][0]
    batches = mixture([(records, 1.0), (records, 1.0)], 1, seed=0)
    assert keys_of(batches, range(0, 40, 2)) != keys_of(batches, range(1, 41, 2))


@pytest.mark.parametrize("start", [0, 123_457])
def test_shares_match_weights_within_one_percent_over_any_long_window(sources, start):
    keys = keys_of(mixture(sources, 10, seed=0), range(start, start + 300))
    for records, weight in sources:
        inside = origin(records)
        assert sum(key in inside for key in keys) / len(keys) == pytest.approx(
            weight / 3.5, rel=0.01
        )


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_background_thread_ends_with_the_iterator(sources):
    iterator = mixture(sources, 6, seed=0).iterate()
    next(iterator)
    assert readers()
    iterator.close()
    assert not readers()
    forgotten = mixture(sources, 6, seed=0).iterate()
    next(forgotten)
    del forgotten
    assert not readers()


def test_an_error_while_reading_is_raised_where_batches_are_consumed(sources, monkeypatch):
    def fail(self, step, *_):
        if step == 7:
            raise OSError("the disk is gone")
        return {"step": step}

    monkeypatch.setattr(Batches, "at", fail)
    iterator = mixture(sources, 6, seed=0).iterate(5)
    assert [next(iterator)["step"] for _ in range(2)] == [5, 6]
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    assert not readers()


def test_sources_that_cannot_make_a_batch_are_refused(
    sources, make_records, tmp_path, write_jsonl, made_up_documents
):
    records = sources[2][0]
    empty = open_records(records.path, "heldout")
    other_length = make_records(3, "d", seq_len=2 * T)
    other = train_tokenizer(
        [write_jsonl(tmp_path / "a.jsonl", made_up_documents(50, seed=8))], 300, tmp_path / "t"
    )
    for spoilt, batch_size, seed, complaint in [
        ([], 1, 0, "at least one source"),
        ([(records, 1.0)], 0, 0, "batch size of 0"),
        ([(records, 1.0)], 1, -1, "got seed -1"),
        ([(records, 1.0), (empty, 1.0)], 1, 0, "has no heldout records"),
        ([(records, 0.0)], 1, 0, "has weight 0.0"),
        ([(records, float("nan"))], 1, 0, "has weight nan"),
        ([(records, 1.0), (other_length, 1.0)], 1, 0, "has records of 32 tokens"),
        (
            [(records, 1.0), (make_records(3, "e", tokenizer=other), 1.0)],
            1,
            0,
            "different tokenizers",
        ),
        ([(records, 1.0)], 1 + len(records), 0, "smaller than a batch"),
    ]:
        with pytest.raises(UserError, match=complaint):
            mixture(spoilt, batch_size, seed)
