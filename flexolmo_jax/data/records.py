"""Prepared data: fixed-length records on disk, and which of their tokens count.

A prepared directory holds, per split (train, heldout), `<split>.tokens.npy` uint16 or uint32 [R, T]
and `<split>.segments.npy` uint16 [R, T] (0 is padding; 1, 2, ... are the documents in a record),
the tokenizer, and `index.json`, which describes all of them. `prepare.py` writes it. A split with
conversations has `<split>.context.npy` uint8 [R, T] too: 1 is a token of a conversation that is not
the assistant's. Then the chat template lies beside the tokenizer.

Every token of a document is scored, except its first in each record, before which the record has
nothing of it. EOS and padding are not scored; with `data.loss: assistant` context is not either.
Bits per byte are the sum of -log2 p over the scored tokens, divided by their UTF-8 bytes. A byte
that the vocabulary cannot spell (data/tokenizer.py) is a byte more, and 8 bits. What a tokenizer
makes shorter or longer, as by NFC, counts with the bytes of the documents themselves.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
from pydantic import FailFast, Field

from flexolmo_jax.config import LARGEST, LINE, Loss
from flexolmo_jax.data.arrays import BucketArray, map_array, read_header
from flexolmo_jax.data.documents import AS_TEXT, INDEX_FILE
from flexolmo_jax.data.ids import checked_ids
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import write_bytes
from flexolmo_jax.storage.paths import absolute, open_regular, path_of, reason, size_of
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

FORMAT = 1
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)
# counts of bytes of the documents that their tokens do not spell: see SplitIndex
NOT_SPELLED = ("lost_bytes", "lost_in_context", "changed_bytes", "changed_in_context")
# "tokens" and "segments", int32 [T]; where there are conversations "context", bool [T]
Record = dict[str, np.ndarray]

FILES = r"^((train|heldout)\.(tokens|segments|context)\.npy|(tokenizer|chat|conventions)\.json)$"
Count = Annotated[int, Field(ge=0, lt=2**53)]
Difference = Annotated[int, Field(gt=-(2**53), lt=2**53)]
Token = Annotated[int, Field(ge=0, lt=2**24)]
_NAME = 255  # characters of the name of a file or a directory
Name = Annotated[str, Field(max_length=_NAME)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
INPUTS = 100_000  # files of documents; an index of more would be longer than untrusted.JSON_LIMIT
NAMES = 100  # of what is left out, for each reason
# commas and brackets of an index, and keys of each object in it
SIGNS, KEYS = 4 * INPUTS + 1000, 32


@dataclass(frozen=True)
class SplitIndex:
    """What a split holds.

    `scored_bytes` are the UTF-8 bytes of the scored tokens; `fill` is the share of tokens that are
    not padding; `lost_bytes` are those of the documents that no token stands for, and
    `lost_in_context` those of them that are not the assistant's; `changed_bytes` are how many more
    the documents have than their tokens and these, and `changed_in_context` those of what is not
    the assistant's; `conversations` are the documents of messages. The last five are not written
    where they are 0, as in earlier versions.
    """

    records: Count
    documents: Count
    tokens: Count
    scored_tokens: Count
    scored_bytes: Count
    fill: Annotated[float, Field(ge=0, le=1)]
    lost_bytes: Count = 0
    lost_in_context: Count = 0
    changed_bytes: Difference = 0
    changed_in_context: Difference = 0
    conversations: Count = 0

    @classmethod
    def of(cls, seq_len: int, **counts: int) -> "SplitIndex":
        """With the fill that the other counts give."""
        size = counts["records"] * seq_len
        return cls(**counts, fill=round(counts["tokens"] / size, 6) if size else 0.0)


class Content(NamedTuple):
    """What a source holds: by its digest, and in words."""

    sha256: str
    holds: str


@dataclass(frozen=True)
class InputFile:
    """A file that documents were read from: its name only, because the path may be private."""

    name: Name
    bytes: Count
    sha256: Digest

    @classmethod
    def of(cls, file: Path) -> "InputFile":
        """That of a file. Raises UserError where it cannot be read."""
        return cls(name_in_index(file.name), size_of(file), sha256_of(file))


@dataclass(frozen=True)
class LeftOut:
    """Files of directories that were not read, for one reason: how many, and the first names."""

    why: Annotated[str, Field(max_length=100)]
    count: Count
    names: Annotated[list[Name], Field(max_length=NAMES)]


@dataclass(frozen=True)
class Index:
    """The content of `index.json`.

    `text_key` and `separator` are those that the documents were read with, `bad_removed` the
    records of which none could be made. These and `left_out` are not written where they say
    nothing, as in earlier versions.
    """

    format: int
    name: Name
    seq_len: Annotated[int, Field(ge=2, le=LARGEST["max_seq_len"])]
    tokenizer_digest: Digest
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    eos_id: Token
    pad_id: Token
    heldout: Annotated[float, Field(ge=0, lt=1)]
    splits: dict[Split, SplitIndex]
    inputs: Annotated[list[InputFile], Field(max_length=INPUTS), FailFast()]
    duplicates_removed: Count
    empty_removed: Count
    # SHA-256 of every other file in the directory
    files: dict[Annotated[str, Field(pattern=FILES)], Digest]
    text_key: Annotated[str, Field(max_length=LINE)] = AS_TEXT.text_key
    separator: Annotated[str, Field(max_length=LINE)] = AS_TEXT.separator
    bad_removed: Count = 0
    left_out: Annotated[list[LeftOut], Field(max_length=NAMES)] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Index":
        """The index of a prepared directory. Raises UserError where it cannot be used."""
        file = path / INDEX_FILE
        try:
            fields = parse_json(read_bytes(absolute(file)), SIGNS, KEYS)
            found = fields.get("format") if isinstance(fields, dict) else None
            if type(found) is int and found != FORMAT:
                raise UserError(
                    f"{file} has format {found!s:.20}, this version reads {FORMAT}: prepare the"
                    " data again"
                )
            conform(cls, fields)
            fields["splits"] = {split: SplitIndex(**fields["splits"][split]) for split in SPLITS}
            fields["inputs"] = [InputFile(**entry) for entry in fields["inputs"]]
            fields["left_out"] = [LeftOut(**entry) for entry in fields.get("left_out", [])]
            return cls(**fields)
        except (FileNotFoundError, NotADirectoryError) as error:
            message = (
                f"{path} is not a prepared directory (no {INDEX_FILE} in it): make one with"
                " `flexolmo data prepare`"
            )
            raise UserError(message) from error
        except OSError as error:
            raise UserError(f"cannot read {file}: {reason(error)}") from error
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{file} is damaged or not an index of prepared data ({error!s:.200}): prepare the"
                " data again"
            ) from error

    @property
    def content(self) -> Content:
        """By the digests of the files, whatever they were prepared from and wherever they lie."""
        files = json.dumps(self.files, sort_keys=True)
        documents, tokens = (
            sum(getattr(split, count) for split in self.splits.values())
            for count in ("documents", "tokens")
        )
        holds = f"{documents} documents of {tokens} tokens (files: {len(self.inputs)})"
        return Content(hashlib.sha256(files.encode()).hexdigest(), holds)

    def write(self, path: Path) -> None:
        """Writes `index.json` into a directory."""
        fields = asdict(self)
        for split in fields["splits"].values():
            for count in (*NOT_SPELLED, "conversations"):
                if not split[count]:
                    del split[count]
        for key in ("text_key", "separator", "bad_removed", "left_out"):
            if fields[key] in (getattr(AS_TEXT, key, None), 0, []):
                del fields[key]
        write_bytes(path / INDEX_FILE, (json.dumps(fields, indent=1) + "\n").encode())


class Records:
    """One split of a prepared directory: `len(records)`, `records[i]`.

    It is memory-mapped, or read from a bucket record by record.
    """

    def __init__(self, path: Path, split: Split):
        if split not in SPLITS:
            raise UserError(f"got split {split!r}, expected one of {', '.join(SPLITS)}")
        self.path = path_of(path)
        self.split: Split = split
        self.index = Index.read(self.path)
        self._tokens = self._map("tokens", np.dtype(token_dtype(self.index.vocab_size)))
        self._segments = self._map("segments", np.dtype(np.uint16))
        self._context = self._map("context", np.dtype(np.uint8)) if self.conversations else None

    @property
    def name(self) -> str:
        """The directory's name."""
        return absolute(self.path).name

    @property
    def seq_len(self) -> int:
        """Tokens in a record, T."""
        return self.index.seq_len

    @property
    def tokenizer_digest(self) -> str:
        """`text_digest` of the tokenizer that the records were made with."""
        return self.index.tokenizer_digest

    @property
    def conversations(self) -> int:
        """How many of this split's documents are conversations."""
        return self.stats.conversations

    @property
    def lost_bytes(self) -> int:
        """UTF-8 bytes of this split's documents that no token stands for."""
        return self.stats.lost_bytes

    @property
    def lost_in_context(self) -> int:
        """Those of them that are in conversations, but not the assistant's."""
        return self.stats.lost_in_context

    @property
    def changed_bytes(self) -> int:
        """How many bytes more than their tokens and `lost_bytes` this split's documents have."""
        return self.stats.changed_bytes

    @property
    def changed_in_context(self) -> int:
        """Those of them that are in conversations, but not the assistant's."""
        return self.stats.changed_in_context

    @property
    def stats(self) -> SplitIndex:
        """What this split holds."""
        return self.index.splits[self.split]

    @property
    def content(self) -> Content:
        """What the whole directory holds."""
        return self.index.content

    def __len__(self) -> int:
        return self.stats.records

    def __getitem__(self, index: int) -> Record:
        """One record as "tokens" and "segments", int32 [T], and in a split with conversations
        "context", bool [T]."""
        what = f"{self.path}: record {index}"
        record = {
            "tokens": checked_ids(self._tokens[index], self.index.vocab_size, what),
            "segments": self._segments[index].astype(np.int32),
        }
        if self._context is not None:
            record["context"] = self._context[index] != 0
        return record

    def check_digests(self) -> None:
        """Reads every file. Raises UserError for the first whose digest differs from the index."""
        for name, digest in self.index.files.items():
            if sha256_of(self.path / name) != digest:
                raise UserError(
                    f"{self.path / name} is not the file that was prepared (its SHA-256 differs):"
                    " prepare it again"
                )

    def _map(self, kind: str, dtype: np.dtype) -> np.ndarray | BucketArray:
        file = self.path / f"{self.split}.{kind}.npy"
        shape = (self.stats.records, self.seq_len)
        try:
            header, size = read_header(file)
        except OSError as error:
            raise UserError(
                f"cannot read {file}: {reason(error)}; prepare the data again"
            ) from error
        except ValueError as error:
            raise UserError(f"{file} is not a NumPy file: prepare the data again") from error
        if header is None:
            raise UserError(f"{file} is not a NumPy file: prepare the data again")
        expected = header.start + shape[0] * shape[1] * dtype.itemsize
        if header[:3] != (shape, False, dtype) or size != expected:
            raise UserError(
                f"{file} holds {header.shape} {header.dtype} in {size} bytes, its index says"
                f" {shape} {dtype} in {expected}: an incomplete copy, or files of two preparations;"
                " copy or prepare it again"
            )
        return map_array(file, dtype, header.start, shape)


def open_records(path: Path, split: Split) -> Records:
    """Opens a split of a prepared directory. Raises UserError where it or a file is not whole."""
    return Records(path, split)


def name_in_index(name: str) -> str:
    """A file's name as an index has it: of bytes that are not UTF-8, escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")[:_NAME]


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The type in which token ids are stored."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def positions(segments: np.ndarray) -> np.ndarray:
    """int [.., T] -> int32 [.., T]: each token's position in its document; 0 at padding.

    It is counted from where the document starts in the record.
    """
    at = np.arange(segments.shape[-1], dtype=np.int32)
    starts = np.zeros(segments.shape, bool)
    starts[..., 1:] = segments[..., 1:] != segments[..., :-1]
    start = np.maximum.accumulate(np.where(starts, at, 0), axis=-1)
    return np.where(segments != 0, at - start, 0).astype(np.int32)


def left_out(record: Record, loss: Loss) -> np.ndarray | None:
    """What does not count in the loss: the context of a record or batch, or nothing."""
    return record.get("context") if loss == "assistant" else None


def loss_targets(segments: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
    """int [.., T] -> bool [.., T]: the tokens to learn to predict.

    They are all tokens of a document, with EOS, but its first in the record, and `context` (bool
    [.., T]), of which `left_out` says whether it is learnt.
    """
    targets = np.zeros(segments.shape, bool)
    targets[..., 1:] = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] != 0)
    return targets if context is None else targets & ~context


def scored_targets(
    tokens: np.ndarray, segments: np.ndarray, eos_id: int, context: np.ndarray | None = None
) -> np.ndarray:
    """int [.., T] twice -> bool [.., T]: the scored tokens, `loss_targets` without EOS."""
    return loss_targets(segments, context) & (tokens != eos_id)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hex. Raises UserError where it cannot be read."""
    try:
        with open_regular(absolute(file)) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason(error)}") from error
