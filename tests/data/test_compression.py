"""Compressed documents: every form that a format allows gives the same text, in bounded memory, and
what is cut short is an error."""

import bz2
import gzip
import json
import lzma
import struct
import subprocess
import sys

import pytest

from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.errors import UserError

TEXTS = [f"document {i} — 東京\n" * (i % 7 + 1) for i in range(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
HALVES = LINES[:1000], LINES[1000:]
SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"notes"


def zstd(data: bytes, size: bool = True) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(write_content_size=size, write_checksum=True).compress(data)


def lz4(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS |= {".zst": zstd, ".lz4": lz4}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("ending", ["", ".gzip", ".zstd"])
def test_what_a_file_begins_with_says_how_it_is_compressed(tmp_path, suffix, ending):
    """Also of a .jsonl that is compressed, and of a name that says another format."""
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACKERS[suffix](LINES))
    assert list(read_documents(path)) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("form", [".jsonl", ".json", ".ndjson", ".JSONL"])
def test_dolmas_names_are_read_in_capitals_or_not(tmp_path, suffix, form):
    for ending in (suffix, suffix.upper()):
        (tmp_path / f"a{form}{ending}").write_bytes(PACKERS[suffix](LINES))
    files = [path for path in tmp_path.iterdir() for _ in read_documents(path)]
    assert len(files) == 2 * len(TEXTS)
    assert list(read_documents(tmp_path)) == 2 * TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_streams_one_behind_another_are_one_file(tmp_path, suffix):
    first, second = map(PACKERS[suffix], HALVES)
    forms = {
        "joined": first + second,
        "with nothing between": first + PACKERS[suffix](b"") + second,
    }
    if suffix in (".gz", ".xz"):
        forms |= {
            "padded": first + second + bytes(8192),
            "padded between": first + bytes(4) + second,
        }
    if suffix == ".zst":
        forms["skippable frames"] = SKIPPABLE + first + SKIPPABLE + second + SKIPPABLE
        forms["without sizes"] = zstd(HALVES[0], size=False) + zstd(HALVES[1], size=False)
    for name, data in forms.items():
        (path := tmp_path / f"{name}.jsonl{suffix}").write_bytes(data)
        assert list(read_documents(path)) == TEXTS, name


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_cut_short_anywhere_is_an_error_with_its_path(tmp_path, suffix):
    packed = PACKERS[suffix](HALVES[0]) + PACKERS[suffix](HALVES[1])
    path = tmp_path / f"a.jsonl{suffix}"
    starts = len(PACKERS[suffix](HALVES[0]))
    for length in (
        starts - 9,
        starts - 1,
        starts + 2,
        starts + 20,
        len(packed) - 5,
        len(packed) - 1,
    ):
        path.write_bytes(packed[:length])
        with pytest.raises(UserError, match=rf"cannot read {path}: .*is the file complete\?"):
            list(read_documents(path))


@pytest.mark.parametrize("suffix", PACKERS)
def test_damage_and_what_follows_the_last_stream_are_errors(tmp_path, suffix):
    """The standard library's own readers ignore what follows a stream of bzip2 and xz."""
    packed = PACKERS[suffix](LINES)
    path = tmp_path / f"a.jsonl{suffix}"
    for data in (packed + b"garbage, not a stream", packed[:60] + b"!?" + packed[62:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"cannot read {path}"):
            list(read_documents(path))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".json"])
def test_every_kind_of_text_may_be_compressed(tmp_path, suffix):
    texts = {".csv": b"id,text\n1,a b\n", ".tsv": b"id\ttext\n1\ta b\n"}
    data = texts.get(suffix, b"a b" if suffix == ".txt" else b'[{"text": "a b"}]')
    for ending, pack in PACKERS.items():
        (tmp_path / f"a{suffix}{ending}").write_bytes(pack(data))
    assert list(read_documents(tmp_path)) == ["a b"] * len(PACKERS)


def test_a_zstd_window_of_two_gibibytes_is_read(tmp_path):
    """As `zstd --long=31` writes it."""
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(
        window_log=31, compression_level=1, strategy=1, write_content_size=False
    )
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (path := tmp_path / "a.jsonl.zst").write_bytes(packer.compress(LINES) + packer.flush())
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert list(read_documents(path)) == TEXTS


READ = """
import sys
from pathlib import Path
from flexolmo_jax.data.documents import read_documents
try:
    list(read_documents(Path(sys.argv[1])))
except Exception as error:
    print(error)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".lz4"])
def test_few_compressed_bytes_do_not_fill_the_memory(tmp_path, suffix):
    """Megabytes of zeros have less than a kilobyte as bzip2."""
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](bytes(30_000_000)) * 30)
    command = [sys.executable, "-c", READ, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told, peak = done.stdout.strip().rsplit("\n", 1)
    assert "line 1: it has more than" in told
    assert int(peak) * 1024 < 5e8


def test_a_name_that_says_compressed_of_a_plain_file_is_an_error(tmp_path):
    for suffix in PACKERS:
        (path := tmp_path / f"a.txt{suffix}").write_bytes(b"plain")
        with pytest.raises(UserError, match="it is not compressed, as its name says"):
            list(read_documents(path))


def test_a_missing_package_is_named_for_lz4(tmp_path, monkeypatch):
    (path := tmp_path / "a.jsonl.lz4").write_bytes(lz4(LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(read_documents(path))
