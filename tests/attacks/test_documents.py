"""Documents of strangers, as public text is. The promise: no file takes more memory than a document
may."""

import gzip
import resource
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
