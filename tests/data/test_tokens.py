"""Token files: cut where they lie, boundaries from EOS alone, and refused where they cannot be the
tokenizer's."""

import copy
import math

import jax
import numpy as np
import pytest

from flexolmo_jax.config import DataConfig, Dataset, IdType
from flexolmo_jax.data.prepare import open_data, open_heldout, prepare
from flexolmo_jax.data.records import loss_targets
from flexolmo_jax.data.tokens import TokenRecords, has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.loaded import load
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.pretrain import pretrain
from flexolmo_jax.train.sources import choose_tokenizer, open_sources
from tests.tiny import run_config


@pytest.fixture
def stream(tokenizer, made_up_documents):
    """Tokens of documents, one after another, an EOS behind each."""
    return np.concatenate(
        [[*tokenizer.encode(text), tokenizer.eos_id] for text in made_up_documents(60, seed=3)]
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(
    ("name", "is_raw"), [("part.npy", False), ("part.npy", True), ("part.bin", True)]
)
def test_records_are_the_stream_cut_at_every_length(
    tokenizer, stream, tmp_path, name, is_raw, dtype
):
    file = tmp_path / name
    stream.astype(dtype).tofile(file) if is_raw else np.save(file, stream.astype(dtype))
    records = open_data(file, tokenizer, 50, "train")
    assert has_tokens(file) and has_tokens(tmp_path) and len(records) == len(stream) // 50
    for i in range(len(records)):
        record, expected = records[i], stream[50 * i : 50 * (i + 1)]
        np.testing.assert_array_equal(record["tokens"], expected)
        ends = np.flatnonzero(expected == tokenizer.eos_id)
        np.testing.assert_array_equal(record["segments"], 1 + np.searchsorted(ends, np.arange(50)))
        assert not loss_targets(record["segments"])[
            [0, *(end + 1 for end in ends if end < 49)]
        ].any()
    with pytest.raises(IndexError):
        records[len(records)]


def test_files_of_a_directory_follow_one_another_and_their_ends_are_not_used(tokenizer, tmp_path):
    for name, length in (("b.npy", 25), ("a.npy", 31), ("c.npy", 9), ("d/e.npy", 20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (np.arange(length) + 50).astype(np.uint16).tofile(tmp_path / name)
    (tmp_path / "empty.npy").touch()
    records = TokenRecords(tmp_path, tokenizer, 10)
    starts = [int(records[i]["tokens"][0]) - 50 for i in range(len(records))]
    assert starts == [0, 10, 20, 0, 10, 0, 10]  # a, b, d/e


def test_a_vocabulary_beyond_uint16_reads_uint32(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 100_278)
    ids = np.random.default_rng(0).integers(100_278, size=64)
    ids.astype(np.uint32).tofile(tmp_path / "x.npy")
    np.testing.assert_array_equal(
        TokenRecords(tmp_path / "x.npy", tokenizer, 32)[1]["tokens"], ids[32:]
    )


@pytest.mark.parametrize("dtype", [">u2", ">u4", "int32", "int64", "uint64", ">i8", "uint8"])
def test_a_header_says_the_type_whatever_it_is(tokenizer, tmp_path, dtype):
    ids = np.arange(64) + 50
    np.save(tmp_path / "x.npy", ids.astype(dtype))
    record = TokenRecords(tmp_path / "x.npy", tokenizer, 32)[1]["tokens"]
    np.testing.assert_array_equal(record, ids[32:])
    assert record.dtype == np.int32


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_the_config_names_the_type_of_a_file_without_a_header(tokenizer, tmp_path, dtype):
    ids = np.arange(64) + 50
    ids.astype(dtype).tofile(tmp_path / "x.bin")
    for vocab_size in (400, 100_278):
        tokenizer = copy.copy(tokenizer)
        tokenizer.vocab_size = vocab_size
        records = open_data(tmp_path / "x.bin", tokenizer, 32, "train", dtype=dtype)
        assert len(records) == 2
        np.testing.assert_array_equal(records[1]["tokens"], ids[32:])


def test_a_named_type_reaches_training_and_evaluation(tokenizer, tmp_path):
    for name in ("train.bin", "valid.bin"):
        (np.arange(64) + 50).tofile(tmp_path / name)
    train, valid = (
        Dataset(path=str(tmp_path / name), dtype="int64") for name in ("train.bin", "valid.bin")
    )
    data = DataConfig(train=(train,), eval=(valid,), seq_len=32, batch_size=2)
    batches, heldout = open_sources(data, tokenizer, 0)
    assert sorted(batches.at(0)["tokens"][:, 0]) == [50, 82]
    np.testing.assert_array_equal(heldout["valid"][1]["tokens"], np.arange(32) + 82)


@pytest.mark.parametrize("vocab_size", [400, 100_278])
def test_a_type_that_nothing_says_is_not_guessed(tokenizer, tmp_path, vocab_size):
    tokenizer = copy.copy(tokenizer)
    tokenizer.vocab_size = vocab_size

    def refuses(message, dtype: IdType = ""):
        with pytest.raises(UserError, match=message):
            open_data(tmp_path / "x.bin", tokenizer, 8, "train", dtype=dtype)

    (np.arange(64) + 50).tofile(tmp_path / "x.bin")
    refuses("seems to hold ids of 64 bits.*save it with numpy.save, or name its type in the config")
    np.zeros(1 << 18, np.uint16).tofile(tmp_path / "x.bin")
    refuses("begins with zeros, which do not tell its type")
    (tmp_path / "x.bin").write_bytes((np.arange(64) + 50).astype(np.uint32).tobytes()[:-2])
    refuses("254 bytes, which is not a whole number of uint32")
    (tmp_path / "x.bin").write_bytes(bytes(12))
    refuses("12 bytes, which is not a whole number of int64", "int64")
    np.savez(tmp_path / "x.npz", ids=np.arange(64))
    for name in ("x.npz", "x.bin"):
        (tmp_path / name).write_bytes((tmp_path / "x.npz").read_bytes())
        with pytest.raises(UserError, match=f"{name} is an archive or compressed"):
            open_data(tmp_path / name, tokenizer, 8, "train")


@pytest.mark.parametrize(("wide", "named"), [("uint32", "uint16"), ("int64", "uint32")])
def test_a_named_type_that_reads_zeros_between_ids_is_refused(tokenizer, tmp_path, wide, named):
    (np.arange(64) + 50).astype(wide).tofile(tmp_path / "part.bin")
    with pytest.raises(UserError, match=f"dtype {named} in the config, and then every second"):
        TokenRecords(tmp_path, tokenizer, 8, named)


def test_names_in_capitals_are_token_files_too(tokenizer, tmp_path):
    for name in ("A.NPY", "b.Bin"):
        (np.arange(16) + 50).astype(np.uint16).tofile(tmp_path / name)
    assert has_tokens(tmp_path / "A.NPY") and len(TokenRecords(tmp_path, tokenizer, 8)) == 4
    (tmp_path / "C.NPZ").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"C\.NPZ is an archive"):
        TokenRecords(tmp_path, tokenizer, 8)


def test_an_archive_beside_token_files_is_not_passed_over(tokenizer, tmp_path):
    np.save(tmp_path / "a.npy", np.full(64, 50, np.uint16))
    np.savez(tmp_path / "b.npz", np.full(64, 50))
    with pytest.raises(UserError, match=r"b\.npz is an archive"):
        open_data(tmp_path, tokenizer, 8, "train")


def test_a_dtype_that_says_something_else_is_refused(tokenizer, tmp_path, write_jsonl):
    np.save(tmp_path / "x.npy", np.full(64, 50, np.uint16))
    with pytest.raises(UserError, match=r"holds uint16, as its header says, and .* names int64"):
        open_data(tmp_path / "x.npy", tokenizer, 8, "train", dtype="int64")
    documents = write_jsonl(tmp_path / "a.jsonl", ["a document"])
    with pytest.raises(UserError, match="is no token file"):
        open_data(documents, tokenizer, 8, "train", dtype="int64")


@pytest.mark.parametrize("ids", [[50, -1], [50, 400], [50, 2**31], [50, 2**32 + 50]])
def test_an_id_that_the_tokenizer_lacks_is_told_with_its_place(tokenizer, tmp_path, ids):
    values = np.full(1 << 17, 50, np.int64)
    values[-1] = ids[1]
    np.save(tmp_path / "x.npy", values)
    records = TokenRecords(tmp_path / "x.npy", tokenizer, 8)
    with pytest.raises(UserError, match=rf"x\.npy: .*place 131071 has token {ids[1]}, the token"):
        records[len(records) - 1]


def test_a_directory_of_several_kinds_of_data_is_refused(tokenizer, tmp_path, write_jsonl):
    def directory(name, *kinds):
        place = tmp_path / name
        for kind in kinds:
            (place / kind).parent.mkdir(parents=True, exist_ok=True)
            if kind.endswith(".jsonl"):
                write_jsonl(place / kind, ["one document", "and another"])
            elif kind.endswith(".npy"):
                np.save(place / kind, np.full(64, 50, np.uint16))
            else:
                source = write_jsonl(tmp_path / "source.jsonl", ["one document", "and another"])
                prepare([source], tokenizer, 8, place / kind, heldout=0)
        return place

    def refuses(message, place):
        for opened in (open_data, open_heldout):
            with pytest.raises(UserError, match=f"{place.name} holds .*{message}"):
                opened(place, tokenizer, 8, "train")

    refuses("token files .*documents", directory("a", "x.npy", "deep/a.jsonl"))
    refuses("token files .*prepared records", directory("b", "x.npy", "data"))
    refuses("prepared records .*documents", directory("c", "data", "a.jsonl"))
    refuses("prepared records .*give each of them", directory("d", "data", "more"))
    one = directory("e", "data") / "data"
    assert len(open_data(one, tokenizer, 8, "train")) > 0
    write_jsonl(one / "a.jsonl", ["one more"])
    refuses("prepared records .*documents", one)
    places = (directory("f", "a.jsonl", "b/c.jsonl"), directory("g", "a.npy", "b/c.npy"))
    assert [has_tokens(place) for place in places] == [False, True]


def test_training_takes_all_of_them_and_evaluation_only_others(tokenizer, stream, tmp_path):
    for name in ("train.npy", "valid.npy"):
        stream.astype(np.uint16).tofile(tmp_path / name)
    tokenizer.save(tmp_path / "tokenizer.json")
    train, valid = (Dataset(path=str(tmp_path / name)) for name in ("train.npy", "valid.npy"))
    data = DataConfig(
        train=(train,), tokenizer=str(tmp_path / "tokenizer.json"), seq_len=50, batch_size=2
    )
    batches, heldout = open_sources(data, choose_tokenizer(data), 0)
    assert not heldout
    seen = np.concatenate([batches.at(step)["tokens"] for step in range(len(stream) // 50 // 2)])
    cut = stream[: len(stream) // 50 * 50].reshape(-1, 50)
    assert {record.tobytes() for record in seen} <= {
        record.astype(np.int32).tobytes() for record in cut
    } and len(seen) > 10

    data = DataConfig(
        train=(train,),
        eval=(valid,),
        tokenizer=str(tmp_path / "tokenizer.json"),
        seq_len=50,
        batch_size=2,
    )
    _, heldout = open_sources(data, choose_tokenizer(data), 0)
    assert list(heldout) == ["valid"] and len(heldout["valid"]) == len(stream) // 50
    with pytest.raises(UserError, match=r"in data\.train and in data\.eval"):
        open_sources(
            DataConfig(train=(train,), eval=(train,), seq_len=50, batch_size=2), tokenizer, 0
        )
    with pytest.raises(UserError, match=r"set data\.tokenizer"):
        choose_tokenizer(DataConfig(train=(train,)))


def test_what_cannot_be_this_tokenizers_is_refused(tokenizer, tmp_path):
    def refuses(message, name="x.npy"):
        with pytest.raises(UserError, match=message):
            TokenRecords(tmp_path / name, tokenizer, 8)

    np.full(99, 60_000, np.uint16).tofile(tmp_path / "x.npy")
    refuses("has token 60000, the tokenizer 400")
    (tmp_path / "x.npy").write_bytes(bytes(33))
    refuses("33 bytes, which is not a whole number of uint16")
    np.zeros(7, np.uint16).tofile(tmp_path / "x.npy")
    refuses("no file of 8 tokens")
    np.save(tmp_path / "x.npy", np.zeros(64, np.float32))
    refuses("holds float32")
    np.save(tmp_path / "x.npy", np.zeros((8, 8), np.uint16))
    refuses(r"holds uint16 \(8, 8\)")
    np.save(tmp_path / "x.npy", np.zeros(64, np.uint16))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-5])
    refuses("not a whole NumPy file")

    late = np.ones(1 << 17, np.uint16)
    late[-1] = 999
    late.tofile(tmp_path / "x.npy")
    records = TokenRecords(tmp_path / "x.npy", tokenizer, 8)
    with pytest.raises(UserError, match="has token 999"):
        records[len(records) - 1]


def test_a_run_and_an_evaluation_take_token_files(tokenizer, stream, tmp_path):
    """Bits per byte are those of the documents' pieces, each on its own."""
    tokenizer.save(tmp_path / "tokenizer.json")
    for name in ("train.npy", "valid.npy"):
        stream.astype(np.uint16).tofile(tmp_path / name)
    sources = {
        "train": [{"path": str(tmp_path / "train.npy")}],
        "eval": [{"path": str(tmp_path / "valid.npy")}],
    }
    data = sources | {"tokenizer": str(tmp_path / "tokenizer.json"), "batch_size": 8, "seq_len": 32}
    pretrain(run_config("anchor", tmp_path, "train.steps=3", data=data), tmp_path / "run")
    assert "valid" in read_metrics(tmp_path / "run")[-1]["bits_per_byte"]

    model = load(tmp_path / "run")
    score = evaluate(model, [tmp_path / "valid.npy"], limit=3)
    records, bits, size = TokenRecords(tmp_path / "valid.npy", tokenizer, 64), 0.0, 0
    for record in (records[i] for i in range(3)):
        for segment in range(1, record["segments"].max() + 1):
            piece = record["tokens"][record["segments"] == segment]
            log_p = jax.nn.log_softmax(model.logits(piece[None])[0, :-1])
            scored = piece[1:] != tokenizer.eos_id
            bits -= float(
                np.asarray(log_p)[np.arange(len(piece) - 1), piece[1:]][scored].sum()
            ) / math.log(2)
            size += int(tokenizer.byte_lengths[piece[1:][scored]].sum())
    assert score["bytes"]["valid.npy"] == size
    np.testing.assert_allclose(score["bits_per_byte"]["valid.npy"], bits / size, rtol=1e-5)
