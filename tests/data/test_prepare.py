"""Prepared data: what the documents were can be recomputed from it, mistakes are refused, and
nothing half-written is left."""

import errno
import hashlib
import json
import multiprocessing
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo_jax.data import prepare as module
from flexolmo_jax.data import shards, split_writer
from flexolmo_jax.data.documents import is_heldout
from flexolmo_jax.data.prepare import prepare, prepare_cached
from flexolmo_jax.data.records import Index, loss_targets, open_records, positions, scored_targets
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import MARK
from flexolmo_jax.storage.outputs import UNFINISHED

T = 64


@pytest.fixture(scope="session")
def texts(made_up_documents):
    return made_up_documents(400, seed=1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, write_jsonl, texts):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus, tokenizer):
    out = tmp_path_factory.mktemp("prepared") / "mine"
    prepare([corpus], tokenizer, T, out, heldout=0.2)
    return out


def pieces_of(path, split):
    records = open_records(path, split)
    for record in (records[i] for i in range(len(records))):
        for segment in range(1, record["segments"].max() + 1):
            yield tuple(record["tokens"][record["segments"] == segment].tolist())


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_every_document_is_in_its_split_whole_or_in_record_long_pieces(prepared, texts, tokenizer):
    for split in ("train", "heldout"):
        inside = [
            text
            for text in texts
            if is_heldout(hashlib.sha256(text.encode()).digest(), 0.2) == (split == "heldout")
        ]
        encoded = [[*tokenizer.encode(text), tokenizer.eos_id] for text in inside]
        assert any(len(tokens) > T for tokens in encoded)
        expected = Counter(
            tuple(tokens[i : i + T]) for tokens in encoded for i in range(0, len(tokens), T)
        )
        assert Counter(pieces_of(prepared, split)) == expected
        assert open_records(prepared, split).stats.documents == len(inside)


def test_the_index_counts_what_the_records_hold(prepared, tokenizer):
    index = Index.read(prepared)
    assert (index.name, index.seq_len, index.tokenizer_digest) == ("mine", T, tokenizer.digest)
    for split, stats in index.splits.items():
        pieces = list(pieces_of(prepared, split))
        scored = [[token for token in piece[1:] if token != tokenizer.eos_id] for piece in pieces]
        assert stats.tokens == sum(map(len, pieces))
        assert stats.scored_tokens == sum(map(len, scored))
        assert stats.scored_bytes == sum(
            int(tokenizer.byte_lengths[ids].sum()) for ids in scored if ids
        )
        assert stats.fill == pytest.approx(stats.tokens / (stats.records * T), abs=1e-6)
        assert stats.fill > 0.9


def test_the_scored_bytes_of_whole_documents_are_their_text_without_the_first_token(
    tmp_path, write_jsonl, tokenizer
):
    texts = ["naïve 東京", "one more document", "x"]
    index = prepare(
        [write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer, 512, tmp_path / "out", heldout=0
    )
    first = sum(int(tokenizer.byte_lengths[tokenizer.encode(text)[0]]) for text in texts)
    assert index.splits["train"].scored_bytes == sum(len(text.encode()) for text in texts) - first


def test_documents_of_white_space_are_left_out_and_counted_in_one_line(
    tmp_path, write_jsonl, tokenizer, capfd
):
    texts = ["one document", " another "]
    blank = [" ", "\n\t \r\n", "\u3000\u00a0", "\x1c", ""]
    indices = [
        prepare([write_jsonl(tmp_path / f"{name}.jsonl", given)], tokenizer, 8, tmp_path / name)
        for name, given in (("with", [*blank, *texts, " "]), ("without", texts))
    ]
    assert "left out 6 documents of with that hold nothing but white" in capfd.readouterr().err
    assert indices[0].empty_removed == 6 and indices[0].splits == indices[1].splits
    for name in ("train.tokens.npy", "heldout.tokens.npy"):
        assert files_of(tmp_path / "with")[name] == files_of(tmp_path / "without")[name]


def test_a_tokenizer_that_normalises_counts_the_bytes_of_the_text_itself(
    tmp_path, write_jsonl, tokenizer, capfd
):
    tokenizer.save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    fields["normalizer"] = {"type": "NFC"}
    normalising = Tokenizer(json.dumps(fields))
    texts = ["e\u0301 a\u0308 " * 9, "\u212b and \u0958", "plain"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    stats = prepare([source], normalising, 512, tmp_path / "a", heldout=0).splits["train"]
    first = sum(int(normalising.byte_lengths[normalising.encode(text)[0]]) for text in texts)
    assert stats.scored_bytes + stats.changed_bytes + first == sum(len(t.encode()) for t in texts)
    assert open_records(tmp_path / "a", "train").changed_bytes == stats.changed_bytes == 18 + 1 - 3
    assert "count the bytes of the texts themselves" in capfd.readouterr().err
    # what is in normal form already has the index of earlier versions
    plain = write_jsonl(tmp_path / "b.jsonl", ["é and ä", "plain"])
    prepare([plain], normalising, 512, tmp_path / "b", heldout=0)
    assert "changed" not in (tmp_path / "b" / "index.json").read_text()
    assert "themselves" not in capfd.readouterr().err


def test_files_that_are_no_documents_are_told(tmp_path, write_jsonl, tokenizer, capfd):
    (tmp_path / "docs").mkdir()
    write_jsonl(tmp_path / "docs" / "a.jsonl", ["one document"])
    np.save(tmp_path / "docs" / "b.npy", np.arange(9))
    prepare([tmp_path / "docs"], tokenizer, 8, tmp_path / "out", heldout=0)
    assert "docs: left out 1 of another kind (b.npy)" in capfd.readouterr().err


def test_bytes_that_the_vocabulary_cannot_spell_are_counted(
    tmp_path, write_jsonl, lossy_tokenizer, capfd
):
    texts = ["one\x04 two\x1d", "three \U00040000", "four"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    index = prepare([source], lossy_tokenizer, 64, tmp_path / "out", heldout=0)
    assert index.splits["train"].lost_bytes == 3
    assert "cannot spell 3 bytes of out" in capfd.readouterr().err
    assert open_records(tmp_path / "out", "train").lost_bytes == 3
    index = prepare(
        [write_jsonl(tmp_path / "b.jsonl", texts[2:])],
        lossy_tokenizer,
        64,
        tmp_path / "b",
        heldout=0,
    )
    assert "lost_bytes" not in (tmp_path / "b" / "index.json").read_text()
    assert Index.read(tmp_path / "b") == index


def test_the_directory_is_complete_and_names_no_path(prepared, corpus, tokenizer):
    arrays = {
        f"{split}.{kind}.npy" for split in ("train", "heldout") for kind in ("tokens", "segments")
    }
    assert files_of(prepared).keys() == arrays | {"index.json", "tokenizer.json"}
    assert str(corpus.parent) not in (prepared / "index.json").read_text()
    assert Index.read(prepared).inputs[0].sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert Tokenizer.load(prepared).digest == tokenizer.digest
    plain = np.load(prepared / "train.tokens.npy")
    assert plain.dtype == np.uint16
    assert plain.shape == (Index.read(prepared).splits["train"].records, T)
    open_records(prepared, "train").check_digests()


def test_the_number_of_workers_changes_no_byte(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_CHARACTERS", 500)  # many chunks
    for workers in (1, 5):
        prepare([corpus], tokenizer, T, tmp_path / f"{workers}" / "out", workers=workers)
    assert files_of(tmp_path / "1" / "out") == files_of(tmp_path / "5" / "out")


def test_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path, write_jsonl, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", ["x", "y", "x", ""])
    b = write_jsonl(tmp_path / "b.jsonl", ["y", "z", "x "])
    index = prepare([a, b], tokenizer, 8, tmp_path / "out", heldout=0)
    assert (index.duplicates_removed, index.empty_removed, index.splits["train"].documents) == (
        2,
        1,
        4,
    )


def test_a_document_lands_on_the_same_side_in_every_corpus(
    tmp_path, write_jsonl, made_up_documents, tokenizer
):
    documents = made_up_documents(300, seed=2, longest=5)
    sides = []
    for name, part in (("first", documents[:200]), ("second", documents[:99:-1])):
        out = tmp_path / name
        prepare([write_jsonl(tmp_path / f"{name}.jsonl", part)], tokenizer, T, out, heldout=0.3)
        sides.append({split: set(pieces_of(out, split)) for split in ("train", "heldout")})
    assert not sides[0]["train"] & sides[1]["heldout"]
    assert not sides[1]["train"] & sides[0]["heldout"]
    assert len(sides[0]["heldout"] & sides[1]["heldout"]) > 10


@given(st.integers(0, 2**256 - 1), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_the_same_documents_and_more(digest, share, larger):
    data = digest.to_bytes(32, "big")
    assert not is_heldout(data, 0.0)
    if share <= larger and is_heldout(data, share):
        assert is_heldout(data, larger)


def test_the_held_out_share_is_the_one_asked_for(tmp_path, write_jsonl, tokenizer):
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(4000)])
    index = prepare([corpus], tokenizer, T, tmp_path / "out", heldout=0.1)
    # four standard deviations
    assert index.splits["heldout"].documents == pytest.approx(400, abs=80)


def test_a_split_without_documents_has_no_records_and_can_be_opened(
    tmp_path, write_jsonl, tokenizer
):
    prepare([write_jsonl(tmp_path / "a.jsonl", ["x"])], tokenizer, 8, tmp_path / "out", heldout=0)
    assert len(open_records(tmp_path / "out", "heldout")) == 0
    open_records(tmp_path / "out", "heldout").check_digests()


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path, write_jsonl, tokenizer, monkeypatch):
    corpus = write_jsonl(tmp_path / "a.jsonl", ["x y z"])
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    prepare([corpus], tokenizer, 8, tmp_path / "out", heldout=0)
    assert np.load(tmp_path / "out" / "train.tokens.npy").dtype == np.uint32
    assert open_records(tmp_path / "out", "train")[0]["tokens"].dtype == np.int32


@pytest.mark.parametrize("content", ["", '{"text": ""}\n'])
def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path, tokenizer, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="no text in"):
        prepare([tmp_path / "in"], tokenizer, T, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_arguments_are_refused(tmp_path, corpus, tokenizer):
    with pytest.raises(UserError, match="expected 2 or more"):
        prepare([corpus], tokenizer, 1, tmp_path / "out")
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="held-out share"):
            prepare([corpus], tokenizer, T, tmp_path / "out", heldout=share)
    with pytest.raises(UserError, match="--workers is 2: threads of one process; --ray has"):
        prepare([corpus], tokenizer, T, tmp_path / "out", workers=2, ray="local")
    with pytest.raises(UserError, match="no documents"):
        prepare([], tokenizer, T, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        prepare([tmp_path / "nowhere.jsonl"], tokenizer, T, tmp_path / "out")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for out in ("file", "full"):
        with pytest.raises(UserError, match="exists and is not empty"):
            prepare([corpus], tokenizer, T, tmp_path / out)
    with pytest.raises(UserError, match="cannot write"):
        prepare([corpus], tokenizer, T, tmp_path / "file" / "out")


def test_an_empty_output_directory_is_filled_and_readable_by_others_like_any_other(
    tmp_path, corpus, tokenizer
):
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    prepare([corpus], tokenizer, T, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("failure", "seen", "complaint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "no space left"),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
    ],
)
def test_a_full_disk_and_an_interruption_leave_nothing(
    tmp_path, corpus, tokenizer, monkeypatch, failure, seen, complaint
):
    def fail(*_):
        raise failure

    monkeypatch.setattr(split_writer._ArrayFile, "append", fail)
    with pytest.raises(seen, match=complaint):
        prepare([corpus], tokenizer, T, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_bad_line_late_in_the_corpus_leaves_nothing(tmp_path, corpus, tokenizer):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + "{oops\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 401: not JSON"):
        prepare([bad], tokenizer, T, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared directory, to be spoilt."""
    return shutil.copytree(prepared, tmp_path / "copy")


def test_a_truncated_or_foreign_array_is_refused_on_opening(copy):
    data = (copy / "train.tokens.npy").read_bytes()
    (copy / "train.tokens.npy").write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"train\.tokens\.npy holds .* incomplete"):
        open_records(copy, "train")
    (copy / "train.tokens.npy").write_bytes((copy / "heldout.tokens.npy").read_bytes())
    with pytest.raises(UserError, match=r"train\.tokens\.npy holds"):
        open_records(copy, "train")
    for garbage in (b"", b"garbage" * 100):
        (copy / "train.tokens.npy").write_bytes(garbage)
        with pytest.raises(UserError, match=r"train\.tokens\.npy is not a NumPy file"):
            open_records(copy, "train")
    (copy / "train.tokens.npy").unlink()
    with pytest.raises(UserError, match=r"cannot read .*train\.tokens\.npy"):
        open_records(copy, "train")


@pytest.mark.parametrize("name", ["train.tokens.npy", "heldout.segments.npy", "tokenizer.json"])
def test_a_changed_byte_is_found_by_its_digest(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        open_records(copy, "train").check_digests()


def test_what_is_not_a_prepared_directory_is_refused(copy, tmp_path, corpus):
    for path in (tmp_path, tmp_path / "nowhere", corpus):
        with pytest.raises(UserError, match="not a prepared directory"):
            open_records(path, "train")
    with pytest.raises(UserError, match="got split 'test'"):
        open_records(copy, "test")  # type: ignore[arg-type]
    index = json.loads((copy / "index.json").read_text())
    for content in (
        "",
        "[]",
        "{}",
        json.dumps(index | {"surprise": 1}),
        json.dumps(index | {"splits": {}}),
    ):
        (copy / "index.json").write_text(content)
        with pytest.raises(UserError, match="damaged or not an index"):
            open_records(copy, "train")
    (copy / "index.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        open_records(copy, "train")


def test_records_are_named_after_their_directory(copy):
    assert open_records(copy, "train").name == "copy"


SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3]])
TOKENS = np.array([[5, 6, 0, 7, 0, 9, 9], [0, 0, 5, 6, 7, 0, 8]])  # EOS is 0


def test_positions_and_masks_are_these():
    assert positions(SEGMENTS).tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 2, 3, 4]]
    assert positions(SEGMENTS).dtype == np.int32
    assert loss_targets(SEGMENTS).astype(int).tolist() == [
        [0, 1, 1, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
    ]
    assert scored_targets(TOKENS, SEGMENTS, 0).astype(int).tolist() == [
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 1],
    ]


def test_masks_of_a_batch_are_the_masks_of_its_records():
    for function in (positions, loss_targets, lambda segments: scored_targets(TOKENS, segments, 0)):
        assert (function(SEGMENTS[None]) == function(SEGMENTS)[None]).all()
    assert (positions(SEGMENTS)[1] == positions(SEGMENTS[1])).all()


def test_a_prepared_directory_is_its_own_cache_and_must_fit_the_run(
    prepared, tokenizer, tmp_path, write_jsonl, made_up_documents
):
    assert prepare_cached(prepared, tokenizer, T, tmp_path / "cache") == prepared
    with pytest.raises(UserError, match=f"records of {T} tokens, not 128"):
        prepare_cached(prepared, tokenizer, 128, tmp_path / "cache")
    other = train_tokenizer(
        [write_jsonl(tmp_path / "a.jsonl", made_up_documents(50, seed=9))], 300, tmp_path / "other"
    )
    with pytest.raises(UserError, match="another tokenizer"):
        prepare_cached(prepared, other, T, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_raw_documents_are_prepared_once_and_again_when_they_change(
    tmp_path, write_jsonl, tokenizer, monkeypatch
):
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    corpus = write_jsonl(tmp_path / "math.jsonl", ["one", "two"])
    first = prepare_cached(corpus, tokenizer, T)
    assert first.is_relative_to(tmp_path / "cache")
    assert first.name == open_records(first, "train").name == "math"
    with monkeypatch.context() as context:
        context.setattr(module, "prepare", None)  # calling it would fail
        assert prepare_cached(corpus, tokenizer, T) == first
    assert prepare_cached(corpus, tokenizer, 2 * T) != first
    write_jsonl(corpus, ["one", "three"])
    assert prepare_cached(corpus, tokenizer, T) != first


def test_an_interrupted_preparation_is_redone(tmp_path, corpus, tokenizer, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(module, "prepare", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_cached(corpus, tokenizer, T, tmp_path)
    (entry,) = (tmp_path / "prepared").iterdir()
    (entry / ".corpus.0123abcd.tmp" / "content").mkdir(parents=True)  # what a killed process leaves
    (entry / ".corpus.0123abcd.tmp" / UNFINISHED).write_bytes(MARK)
    (entry / ".corpus.0123abcd.tmp" / "content" / "train.tokens.npy").write_bytes(b"half")
    open_records(prepare_cached(corpus, tokenizer, T, tmp_path), "train").check_digests()
    assert sorted(path.name for path in entry.iterdir()) == ["corpus"]


def _prepare_in_a_process(corpus, tokenizer_path, cache, start, results):
    start.wait()
    results.put(str(prepare_cached(corpus, Tokenizer.load(tokenizer_path), T, cache)))


def test_two_processes_at_once_prepare_once(tmp_path, corpus, tokenizer):
    tokenizer.save(tmp_path / "t.json")
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    arguments = (corpus, tmp_path / "t.json", tmp_path / "cache", start, results)
    processes = [context.Process(target=_prepare_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(paths) == 1
    open_records(paths.pop(), "train").check_digests()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, corpus, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set FLEXOLMO_CACHE"):
        prepare_cached(corpus, tokenizer, T, tmp_path / "file")
