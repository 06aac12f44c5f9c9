"""Token files: cut where they lie, boundaries from EOS alone, and refused where they cannot be the
tokenizer's."""

import math

import jax
import numpy as np
import pytest

from flexolmo_jax.config import DataConfig, Dataset
from flexolmo_jax.data.prepare import open_data
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
    assert {row.tobytes() for row in seen} <= {
        row.astype(np.int32).tobytes() for row in cut
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
    refuses("33 bytes, which is no whole number of uint16")
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
