"""Token files as OLMo-core trains on them: flat arrays of ids with an EOS after each document.

They are mapped (in a bucket: read by ranges) and cut into records without being copied: record i is
the i-th run of T tokens of the files in sorted order. What is left over at the end of a file is not
used. A document that does not fit goes on in the next record, as one cut by packing does. Nothing
is deduplicated and nothing is held out: all of a token file is for training, or all of it for
evaluation, as its user says.

A file's name ends in `.npy` or `.bin`. It has NumPy's header or none (AllenAI's `.npy` files have
none). Without a header, the vocabulary decides the type: uint16 up to 65,536 tokens, and uint32
above. If every second value is then 0 as uint16, the file is read as uint32.
"""

import hashlib
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from flexolmo_jax.config import Reading
from flexolmo_jax.data.arrays import BucketArray, map_array, read_header
from flexolmo_jax.data.documents import INDEX_FILE, OTHER, tell_left_out
from flexolmo_jax.data.records import Content, Record, Records, Split, token_dtype
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.folders import below, files_below
from flexolmo_jax.storage.paths import path_of, reason

SUFFIXES = (".npy", ".bin")
_SAMPLE = 1 << 16  # tokens of each file that are checked when it is opened, and of a sample
_SAMPLES, _WHOLE = 256, 1 << 24


def has_tokens(path: Path) -> bool:
    """True where a path is a token file, or a directory of them that is not a prepared one."""
    path = path_of(path)
    return bool(_files(path)) and not (path / INDEX_FILE).exists()


def tell_beside(path: Path, reading: Reading) -> None:
    """As `tell_left_out`, of what a directory holds beside token files: documents, too."""
    entries = below(path) if path.is_dir() else []
    others = [
        (entry.problem or OTHER, entry.shown)
        for entry in entries
        if entry.problem not in ("", "empty") or not entry.path.name.endswith(SUFFIXES)
    ]
    tell_left_out(path, others, reading)


class TokenRecords:
    """Token files as records of `seq_len` tokens: `len(records)`, `records[i]`.

    Raises UserError where a file cannot be read, is not of uint16 or uint32, has ids that the
    tokenizer does not (checked when they are read), or where all files are shorter than a record.
    """

    split: Split = "train"
    lost_bytes = lost_in_context = conversations = 0

    def __init__(self, path: Path, tokenizer: Tokenizer, seq_len: int):
        self.path = path_of(path)
        self.seq_len = seq_len
        self.tokenizer_digest = tokenizer.text_digest
        self._eos_id, self._vocab_size = tokenizer.eos_id, tokenizer.vocab_size
        self._files = [(file, _map(file, tokenizer.vocab_size)) for file in _files(self.path)]
        self._ends = list(accumulate(len(tokens) // seq_len for _, tokens in self._files))
        if not self._ends[-1]:
            raise UserError(
                f"{path} has no file of {seq_len} tokens, the length of a record; set data.seq_len"
                " or give longer files"
            )
        for file, tokens in self._files:
            self._check(file, tokens[:_SAMPLE])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """One record as "tokens" and "segments", int32 [T]."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        file, tokens = self._files[number]
        start = (index - (self._ends[number - 1] if number else 0)) * self.seq_len
        record = tokens[start : start + self.seq_len].astype(np.int32)
        self._check(file, record)
        segments = np.ones(self.seq_len, np.int32)
        segments[1:] += np.cumsum(record[:-1] == self._eos_id, dtype=np.int32)
        return {"tokens": record, "segments": segments}

    @cached_property
    def content(self) -> Content:
        """By the ids themselves; of more than _WHOLE tokens by the files' lengths and by _SAMPLES
        samples, as reading all of a large corpus takes hours."""
        lengths = [len(tokens) for _, tokens in self._files]
        ends, digest = list(accumulate(lengths)), hashlib.sha256(repr(lengths).encode())
        starts = [(i, at) for i, length in enumerate(lengths) for at in range(0, length, _SAMPLE)]
        if ends[-1] > _WHOLE:
            chosen = np.linspace(0, ends[-1] - 1, _SAMPLES, dtype=np.int64).tolist()
            numbered = ((bisect_right(ends, token), token) for token in chosen)
            starts = [(i, token - ends[i] + lengths[i]) for i, token in numbered]
        for i, at in starts:
            sample = self._files[i][1][at : at + _SAMPLE]
            digest.update(sample.astype(np.uint32).tobytes())
        return Content(digest.hexdigest(), f"{ends[-1]} tokens (files: {len(lengths)})")

    def _check(self, file: Path, tokens: np.ndarray) -> None:
        if len(tokens) and int(tokens.max()) >= self._vocab_size:
            raise UserError(
                f"{file} has token {int(tokens.max())}, the tokenizer {self._vocab_size} of them;"
                " it was written with another tokenizer, or as another type than uint16 (to 65,536"
                " tokens) or uint32 (above); give its own, or save it with NumPy's header"
            )


Source = Records | TokenRecords


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return files_below(path, SUFFIXES)
    return [path] if path.name.endswith(SUFFIXES) and path.is_file() else []


def _map(file: Path, vocab_size: int) -> np.ndarray | BucketArray:
    dtype = np.dtype(token_dtype(vocab_size))
    try:
        header, size = read_header(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason(error)}; is the file complete?") from error
    except ValueError as error:
        raise UserError(f"{file} is not a whole NumPy file: {error}; copy it again") from error
    if header is not None:
        if len(header.shape) != 1 or header.dtype not in (np.uint16, np.uint32):
            raise UserError(
                f"{file} holds {header.dtype} {header.shape}; expected a flat array of uint16 or"
                " uint32"
            )
        if size != header.start + header.shape[0] * header.dtype.itemsize:
            raise UserError(
                f"{file} is not a whole NumPy file: it has {size} bytes for {header.shape[0]}"
                f" {header.dtype}; copy it again"
            )
        return map_array(file, header.dtype, header.start, header.shape)
    if size % dtype.itemsize:
        raise UserError(
            f"{file} has {size} bytes, which is not a whole number of {dtype.name}; is the file"
            " complete?"
        )
    tokens = map_array(file, dtype, 0, (size // dtype.itemsize,))
    may_be_wide = dtype == np.uint16 and size % 4 == 0 and size >= 64
    is_wide = may_be_wide and not tokens[:_SAMPLE][1::2].any()
    return map_array(file, np.dtype(np.uint32), 0, (size // 4,)) if is_wide else tokens
