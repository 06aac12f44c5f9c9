"""Documents of strangers, as public text is. The promise: no file takes more memory than a document
may."""

import gzip
import json
import random
import resource
import time
from pathlib import Path

import pytest

from flexolmo_jax.data.documents import LONGEST, read_documents
from flexolmo_jax.errors import UserError


def endless(path: Path) -> Path:
    """A line of a gigabyte in a few megabytes or less."""
    mebibyte = b"a" * (1 << 20)
    if path.suffix == ".gz":
        with gzip.open(path, "wb", 1) as file:
            file.write(b'{"text": "' + mebibyte)
            for _ in range(1000):
                file.write(mebibyte)
    else:
        zstandard = pytest.importorskip("zstandard")
        with path.open("wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as file:
            for _ in range(1000):
                file.write(mebibyte)
    return path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_an_endless_line_is_refused_before_it_is_in_memory(tmp_path, name):
    """5 MB of gzip once took 2.6 GB."""
    path = endless(tmp_path / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="line 1: it has more than"):
        list(read_documents(path, lambda _: None))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 8 * LONGEST


def grown(read) -> int:
    """Bytes that memory grew by, at most, while a document was refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="bytes"):
        read()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_what_lies_beside_a_text_is_refused_before_it_is_parsed(tmp_path):
    """No file takes more than 500 MB: a line of 60 MB of empty lists took 1.5 GB."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "x": [' + b"[]," * 20_000_000 + b"0]}\n")
    assert grown(lambda: list(read_documents(path))) < 5e8


def test_a_long_text_may_have_brackets_and_escapes(tmp_path):
    """A correct result for what only looks like it."""
    text = '[],{"}\\' * 400_000
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": 1, "text": text}) + "\n")
    assert list(read_documents(path)) == [text]


def test_a_text_file_is_one_document_of_a_bounded_size(tmp_path):
    """No file takes more memory than a document may: a sparse one of 4 GB was read whole."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(1 << 32)
    assert grown(lambda: list(read_documents(path))) < 5e8


def test_a_long_line_of_zstd_is_put_together_once(tmp_path):
    """No hang: every 4 kB once copied all that came before, 40 GB for a line of 20 MB."""
    zstandard = pytest.importorskip("zstandard")
    text = random.Random(0).randbytes(12_000_000).hex()
    path = tmp_path / "a.jsonl.zst"
    lines = "".join(json.dumps({"text": part}) + "\n" for part in (text, "the river", "a"))
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(lines.encode()))
    start = time.process_time()
    assert list(read_documents(path)) == [text, "the river", "a"]
    assert time.process_time() - start < 4
