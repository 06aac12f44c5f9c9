"""Token files as OLMo-core trains on them: flat arrays of ids with an EOS after each document.

They are mapped (in a bucket: read by ranges) and cut into records without being copied: record i is
the i-th run of T tokens of the files in sorted order. What is left over at the end of a file is not
used. A document that does not fit goes on in the next record, as one cut by packing does. Nothing
is deduplicated and nothing is held out: all of a token file is for training, or all of it for
evaluation, as its user says.

A file's name ends in `.npy` or `.bin`. NumPy's header says the type, which is any of integers. A
file without one (AllenAI's `.npy` files have none) has the type that the source's key `dtype` names
or else, by the vocabulary, uint16 up to 65,536 tokens, and uint32 above. If every second value is
then 0 as uint16, the file is read as uint32. If it is so as uint32 too, the file is refused, as is
one that begins with nothing but zeros: its type has to be said.
"""

import hashlib
import re
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from flexolmo_jax.config import IdType, Reading
from flexolmo_jax.data.arrays import BucketArray, map_array, read_header
from flexolmo_jax.data.documents import INDEX_FILE, OTHER, tell_left_out
from flexolmo_jax.data.documents import SURE as OF_DOCUMENTS
from flexolmo_jax.data.ids import checked_ids
from flexolmo_jax.data.records import FILES, Content, Record, Records, Split, token_dtype
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.folders import below, ends_in, files_below
from flexolmo_jax.storage.paths import path_of, reason

SUFFIXES = (".npy", ".bin")
# what may hold arrays of ids too, and is not read
PACKED = (".npz", ".npy.gz", ".bin.gz", ".npy.zst", ".bin.zst")
_MAGIC = (b"PK\3\4", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # of zip (.npz), gzip and zstd
_SAMPLE = 1 << 16  # tokens of each file that are checked when it is opened, and of a sample
_SAMPLES, _WHOLE = 256, 1 << 24
_TELLING = 64  # bytes of a file from which on its values tell their type
_NAME_IT = 'save it with numpy.save, or name its type in the config, as "dtype: uint16"'


def has_tokens(path: Path) -> bool:
    """True where a path is a token file, or a directory of them that is not a prepared one.

    Raises UserError for a directory of several kinds of data: one of them would be passed over.
    """
    path = path_of(path)
    if not path.is_dir():
        return bool(_files(path))
    files = _files(path)
    own = [file for file in files if _is_prepared(file)]
    prepared = sorted({file.parent for file in own})
    kinds = {
        "token files": [file for file in files if file not in own],
        "prepared records": prepared,
        "documents": files_below(path, OF_DOCUMENTS) if files else [],
    }
    found = {kind: places for kind, places in kinds.items() if places}
    if len(found) > 1 or prepared not in ([], [path]):
        told = ", ".join(f"{kind} ({places[0]})" for kind, places in found.items())
        raise UserError(
            f"{path} holds {told}; expected documents, or token files, or the records of one"
            " prepared directory: give each of them a path of its own"
        )
    return bool(kinds["token files"]) and not (path / INDEX_FILE).exists()


def tell_beside(path: Path, reading: Reading) -> None:
    """As `tell_left_out`, of what a directory holds beside token files: documents, too."""
    entries = below(path) if path.is_dir() else []
    others = [
        (entry.problem or OTHER, entry.shown)
        for entry in entries
        if entry.problem not in ("", "empty") or not ends_in(entry.path, SUFFIXES)
    ]
    tell_left_out(path, others, reading)


class TokenRecords:
    """Token files as records of `seq_len` tokens: `len(records)`, `records[i]`.

    `dtype`: that of files without NumPy's header. Raises UserError where a file cannot be read, is
    not of integers, has ids that the tokenizer does not (checked when they are read), or where all
    files are shorter than a record.
    """

    split: Split = "train"
    # what the documents were is not known
    lost_bytes = lost_in_context = changed_bytes = changed_in_context = conversations = 0

    def __init__(self, path: Path, tokenizer: Tokenizer, seq_len: int, dtype: IdType = ""):
        self.path = path_of(path)
        self.seq_len = seq_len
        self.tokenizer_digest = tokenizer.text_digest
        self._eos_id, self._vocab_size = tokenizer.eos_id, tokenizer.vocab_size
        packed = files_below(self.path, PACKED) if self.path.is_dir() else []
        files = [*packed, *_files(self.path)]
        self._files = [(file, _map(file, tokenizer.vocab_size, dtype)) for file in files]
        self._ends = list(accumulate(len(tokens) // seq_len for _, tokens in self._files))
        if not self._ends[-1]:
            raise UserError(
                f"{path} has no file of {seq_len} tokens, the length of a record; set data.seq_len"
                " or give longer files"
            )
        for file, tokens in self._files:
            if len(tokens):
                self._checked(file, tokens[:_SAMPLE], 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """One record as "tokens" and "segments", int32 [T]."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        file, tokens = self._files[number]
        start = (index - (self._ends[number - 1] if number else 0)) * self.seq_len
        record = self._checked(file, tokens[start : start + self.seq_len], start)
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

    def _checked(self, file: Path, tokens: np.ndarray, start: int) -> np.ndarray:
        try:
            return checked_ids(tokens, self._vocab_size, str(file), first=start)
        except UserError as error:
            raise UserError(
                f"{error}, the tokenizer {self._vocab_size} of them; it was written with another"
                " tokenizer, or as another type than uint16 (to 65,536 tokens) or uint32 (above);"
                f" give its own, or {_NAME_IT}"
            ) from None


Source = Records | TokenRecords


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return files_below(path, SUFFIXES)
    return [path] if ends_in(path, (*SUFFIXES, *PACKED)) and path.is_file() else []


def _is_prepared(file: Path) -> bool:
    """Whether a file is an array of a prepared directory."""
    return bool(re.fullmatch(FILES, file.name)) and (file.parent / INDEX_FILE).exists()


def _map(file: Path, vocab_size: int, named: IdType) -> np.ndarray | BucketArray:
    try:
        header, size = read_header(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason(error)}; is the file complete?") from error
    except ValueError as error:
        raise UserError(f"{file} is not a whole NumPy file: {error}; copy it again") from error
    if header is None:
        start = map_array(file, np.dtype(np.uint8), 0, (min(size, 4 * _SAMPLE),))[:]
        if ends_in(file, PACKED) or start.tobytes().startswith(_MAGIC):
            raise UserError(
                f"{file} is an archive or compressed; expected a flat array of ids: unpack it, and"
                " save each array with numpy.save"
            )
        dtype = _named(file, start, named) if named else _type_of(file, start, vocab_size)
        if size % dtype.itemsize:
            raise UserError(
                f"{file} has {size} bytes, which is not a whole number of {dtype.name}; is the file"
                " complete?"
            )
        return map_array(file, dtype, 0, (size // dtype.itemsize,))
    if len(header.shape) != 1 or header.dtype.kind not in "iu":
        raise UserError(
            f"{file} holds {header.dtype} {header.shape}; expected a flat array of integers"
        )
    if named and header.dtype != named:
        raise UserError(
            f"{file} holds {header.dtype}, as its header says, and the config names {named} as its"
            " dtype; leave that out"
        )
    if size != header.start + header.shape[0] * header.dtype.itemsize:
        raise UserError(
            f"{file} is not a whole NumPy file: it has {size} bytes for {header.shape[0]}"
            f" {header.dtype}; copy it again"
        )
    return map_array(file, header.dtype, header.start, header.shape)


def _named(file: Path, start: np.ndarray, named: IdType) -> np.dtype:
    """The type that a user names. Raises UserError where the first bytes show a wider one."""
    dtype = np.dtype(named)
    values = start[: len(start) // 8 * 8].view(dtype)
    if len(start) >= _TELLING and values.any() and not values[1::2].any():
        raise UserError(
            f"{file} has the dtype {named} in the config, and then every second value is 0; name"
            " the type that it has, which is twice as wide"
        )
    return dtype


def _type_of(file: Path, start: np.ndarray, vocab_size: int) -> np.dtype:
    """The type of a file without a header, by its first bytes. Raises UserError where these do not
    tell it."""
    dtype = np.dtype(token_dtype(vocab_size))
    while len(start) >= _TELLING:
        values = start[: len(start) // 8 * 8].view(dtype)
        if values[1::2].any():
            return dtype
        if not values.any():
            raise UserError(f"{file} begins with zeros, which do not tell its type; {_NAME_IT}")
        if dtype == np.uint32:
            raise UserError(
                f"{file} seems to hold ids of 64 bits, as every second value of 32 is 0; {_NAME_IT}"
            )
        dtype = np.dtype(np.uint32)
    return dtype
