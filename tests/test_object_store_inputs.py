"""What verbs read in a bucket, as on a disk; buckets that cannot be used, told in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.data import arrays
from flexolmo_jax.data.mixture import mixture
from flexolmo_jax.data.prepare import open_data, prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.shards import SHARD, Documents, open_writers, pack, shards_of
from flexolmo_jax.data.split_writer import join_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.signature import Trust, keygen
from flexolmo_jax.storage import paths
from flexolmo_jax.storage.files import make_folder
from flexolmo_jax.storage.paths import children, listing, path_of
from tests.chats import byte_chat, said
from tests.object_store import forbidding, upload
from tests.test_object_store_training import bits, run
from tests.tiny import SEQ_LEN, documents, run_config


def test_records_in_a_bucket_are_those_on_the_disk_and_only_those_asked_for_are_read(
    bucket, prepared, monkeypatch
):
    there, here = (
        open_records(upload(prepared["public"], bucket / "public"), "train"),
        open_records(prepared["public"], "train"),
    )
    read, sizes = arrays.read_range, []

    def counted(file: Path, start: int, end: int) -> bytes:
        sizes.append(end - start)
        return read(file, start, end)

    monkeypatch.setattr(arrays, "read_range", counted)
    batches = [mixture([(records, 1.0)], batch_size=16, seed=3).at(5) for records in (there, here)]
    for key in batches[0]:
        np.testing.assert_array_equal(batches[0][key], batches[1][key])
    assert sizes == [SEQ_LEN * 2] * 32  # tokens and segments, uint16
    (bucket / "public" / "train.tokens.npy").write_bytes(
        (prepared["public"] / "train.tokens.npy").read_bytes()[:-64]
    )
    with pytest.raises(UserError, match="ended while it was read"):
        there[len(there) - 1]
    with pytest.raises(UserError, match="an incomplete copy"):
        open_records(bucket / "public", "train")


def test_conversations_in_a_bucket_are_prepared_as_on_the_disk(bucket, tmp_path):
    """Their array begins in the midst of the records, and is joined from objects."""
    rows = [{"text": f"{i} " * 30} for i in range(90)] + [{"messages": said("a", "b")}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for out in (bucket / "out", tmp_path / "out"):
        prepare([tmp_path / "a.jsonl"], byte_chat("chatml"), 24, out, heldout=0)
    names = [path.name for path in children(tmp_path / "out")]
    assert "train.context.npy" in names
    assert sorted(listing(bucket / "out")) == sorted(names)
    for name in names:
        assert (bucket / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    there, here = (open_records(at / "out", "train") for at in (bucket, tmp_path))
    assert there[len(there) - 1]["context"].any() == here[len(here) - 1]["context"].any()


def test_records_of_workers_are_joined_in_a_bucket_where_some_have_no_conversations(
    bucket, tmp_path
):
    tokenizer = byte_chat("chatml")
    rows = [{"text": "a " * 40}], [{"messages": said("a", "b")}], [{"text": "c " * 40}]
    files = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for place in (bucket, tmp_path):
        parts = {}
        for shard, file in zip(shards_of(files, [SHARD] * 3), files, strict=True):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows[shard.number]))
            folder = place / "shards" / file.stem
            make_folder(folder)
            with open_writers(folder, tokenizer, 24, bare=True) as writers:
                kept = Documents(0, lambda _: True)
                parts[folder] = pack([shard], kept, writers, tokenizer).splits["train"]
        make_folder(place / "joined")
        join_records(place / "joined", parts, "train", tokenizer, 24)
    for kind in ("tokens", "segments", "context"):
        joined = Path("joined") / f"train.{kind}.npy"
        assert (bucket / joined).read_bytes() == (tmp_path / joined).read_bytes()
    context = np.load(tmp_path / "joined" / "train.context.npy")
    of_each = [part.records for part in parts.values()]
    assert len(context) == sum(of_each) and min(of_each) > 0
    inside = np.split(context.any(axis=1), np.cumsum(of_each)[:-1])
    assert [part.any() for part in inside] == [False, True, False]


def test_token_files_in_a_bucket_are_those_on_the_disk(bucket, tiny_tokenizer, tmp_path):
    tokens = np.random.default_rng(0).integers(2, tiny_tokenizer.vocab_size, 1000)
    np.save(tmp_path / "a.npy", tokens.astype(np.uint16))
    (tmp_path / "b.npy").write_bytes(tokens.astype(np.uint32).tobytes())
    (tmp_path / "c.bin").write_bytes(b"")
    upload(tmp_path, bucket)
    here, there = (
        open_data(place, tiny_tokenizer, SEQ_LEN, "train") for place in (tmp_path, bucket)
    )
    assert len(here) == len(there) == 62
    for i in (0, 30, 31, 61):
        np.testing.assert_array_equal(here[i]["tokens"], there[i]["tokens"])


def test_documents_of_every_kind_in_a_bucket_are_prepared_into_any_cache(
    bucket, corpora, tiny_tokenizer, tmp_path, monkeypatch
):
    import gzip

    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines, texts = corpora["law"].read_bytes(), documents("care", 50)
    (tmp_path / "d" / "deep").mkdir(parents=True)
    (tmp_path / "d" / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "d" / "b.jsonl.zst").write_bytes(zstandard.compress(corpora["code"].read_bytes()))
    (tmp_path / "d" / "deep" / "c.txt").write_text("a text")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "d" / "deep" / "d.parquet"
    )
    prepare([tmp_path / "d"], tiny_tokenizer, SEQ_LEN, tmp_path / "whole" / "d")
    for cache in (tmp_path / "cache", bucket / "cache"):
        monkeypatch.setenv("FLEXOLMO_CACHE", str(cache))
        for _ in range(2):
            records = open_data(
                upload(tmp_path / "d", bucket / "d"), tiny_tokenizer, SEQ_LEN, "train"
            )
        assert str(records.path).startswith(str(cache)) and len(children(cache / "prepared")) == 1
        contents = [
            {name: (place / name).read_bytes() for name in listing(place)}
            for place in (records.path, tmp_path / "whole" / "d")
        ]
        assert contents[0] == contents[1]


def test_hugging_face_checkpoints_go_out_of_a_bucket_and_into_one(bucket, model, capsys):
    upload(model, bucket / "model")
    run(
        capsys,
        "export-hf",
        bucket / "model",
        bucket / "hf",
        "--drop-bias",
        "--max-shard-size",
        "50KB",
    )
    assert sum(name.endswith(".safetensors") for name in listing(bucket / "hf")) > 1
    run(capsys, "import-hf", bucket / "hf", bucket / "back")
    there, here = bits(bucket / "back"), bits(model)
    assert {name: there[name] for name in there} == {name: here[name] for name in there} and len(
        there
    ) >= 10


def test_private_records_do_not_go_into_a_bucket_that_the_documents_are_not_from(
    bucket, anchor, corpora, capsys
):
    arguments = [
        "contribute",
        "--anchor",
        anchor,
        "--documents",
        corpora["law"],
        "--name",
        "law",
        "--out",
        bucket / "law",
    ]
    assert cli.main([*map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert (
        f"your records would be written to {bucket}/law.work" in told
        and "give --work" in told
        and told.count("\n") == 1
    )
    assert not children(bucket)


def test_keys_that_are_trusted_may_lie_in_a_bucket_and_private_ones_may_not(
    bucket, tmp_path, capsys
):
    public = keygen(tmp_path / "hospital")
    (bucket / "keys" / "hospital.pub").write_bytes((tmp_path / "hospital.pub").read_bytes())
    assert Trust.of(bucket / "keys").keys == {public: "hospital"}
    for arguments in (
        ["keygen", f"{bucket}/key"],
        ["package", "run", "--sign-key", f"{bucket}/key", "--out", f"{bucket}/out"],
    ):
        assert cli.main(arguments) == 2
        assert (
            capsys.readouterr().err
            == f"flexolmo: got {bucket}/key, expected a path of this machine: private keys do not"
            " belong in buckets\n"
        )
    assert [path.name for path in children(bucket)] == ["keys"]


# Verbs that read what is in the bucket PLACE or on the disk HERE, and would write into the bucket
# OUT.
MISTAKES = (
    (
        "data prepare --input HERE/public.jsonl --tokenizer HERE/tokenizer.json --seq-len 32 --out"
        " OUT/data"
    ),
    (
        "data prepare --input PLACE/public.jsonl --tokenizer HERE/tokenizer.json --seq-len 32 --out"
        " OUT/data"
    ),
    "tokenizer train --input HERE/public.jsonl --vocab-size 300 --out OUT/tokenizer.json",
    "train HERE/run.yaml --out OUT/run",
    "train PLACE/run.yaml --out OUT/run",
    "publish PLACE/run --public HERE/public.jsonl --out OUT/anchor",
    "contribute --anchor PLACE/anchor --documents PLACE/public.jsonl --name a --out OUT/a",
    "package PLACE/run --out OUT/a",
    "embed-domain --anchor PLACE/anchor --input HERE/public.jsonl --out OUT/row.npy",
    "import-hf PLACE/hf OUT/model",
    "export-hf PLACE/model OUT/hf",
    "merge --anchor PLACE/anchor PLACE/a --out OUT/model",
    "eval PLACE/model --data PLACE/data",
    "generate PLACE/model --prompt a",
    "info PLACE/model",
    "data fetch OUT/texts",
)
EACH = """
import contextlib, io, json, sys
from flexolmo_jax import cli
for arguments in json.loads(sys.argv[1]):
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        status = cli.main(arguments)
    print(json.dumps([arguments, status, told.getvalue()]))
"""


@pytest.mark.parametrize("kind", ["no such bucket", "forbidden to read", "forbidden to write"])
def test_a_bucket_that_cannot_be_used_is_told_in_one_line_and_nothing_is_made(
    kind, object_store, bucket, prepared, tiny, anchor, contributions, tmp_path
):
    place = out = str(bucket)
    if kind == "no such bucket":
        place = out = "gs://no-such-bucket/place"
    if kind == "forbidden to write":
        upload(anchor, bucket / "anchor")
        upload(contributions["law"], bucket / "a")
        (bucket / "public.jsonl").write_bytes((tiny / "public.jsonl").read_bytes())
    config = dump_yaml(run_config("anchor", prepared["public"], "train.steps=1"))
    (tmp_path / "run.yaml").write_text(config)
    (bucket / "run.yaml").write_text(config)
    for name in ("public.jsonl", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    before, here = listing(bucket), set(tmp_path.rglob("*"))
    names = {"PLACE": place, "OUT": out, "HERE": str(tmp_path)}
    mistakes = [[_filled(word, names) for word in line.split()] for line in MISTAKES]
    with forbidding(object_store, reading=kind == "forbidden to read") as environment:
        environment = (environment if kind != "no such bucket" else os.environ) | {
            "PYTHONPATH": str(Path(__file__).parents[1])
        }
        command = [sys.executable, "-c", EACH, json.dumps(mistakes)]
        result = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    assert result.returncode == 0, result.stderr
    for arguments, status, told in map(json.loads, result.stdout.splitlines()):
        # but of progress
        lines = [line for line in told.splitlines() if not re.match(r"[a-z .]+: \d+%", line)]
        assert status == 2 and len(lines) == 1 and lines[0].startswith("flexolmo: "), (
            arguments,
            told,
        )
    assert len(result.stdout.splitlines()) == len(MISTAKES)
    assert listing(bucket) == before and set(tmp_path.rglob("*")) == here


def _filled(word: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(name, value)
    return word


def test_a_path_in_a_bucket_without_gcsfs_is_told_in_one_line(bucket, monkeypatch, capsys):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    paths.file_system.cache_clear()
    assert cli.main(["verify", str(bucket)]) == 2
    told = capsys.readouterr().err
    assert (
        told == "flexolmo: paths in buckets (gs://) need gcsfs; install it: from a clone of"
        " flexolmo-jax, pip install -e '.[gcs]'\n"
    )


@pytest.mark.parametrize(
    "path",
    [
        "gs:/bucket/x",
        "g://bucket/x",
        "gcs://bucket/x",
        "s3://bucket/x",
        "gs://",
        "gs://Bucket/x",
        "gs:///x",
    ],
)
def test_a_misspelt_path_is_told_in_one_line(path, capsys):
    assert cli.main(["verify", path]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"flexolmo: got the path {path}; expected") and told.count("\n") == 1
    with pytest.raises(UserError):
        path_of(path)
