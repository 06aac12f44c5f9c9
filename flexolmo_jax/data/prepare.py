"""Raw documents -> a prepared directory (data/records.py says what is in one).

Documents are read one by one. Blank ones and exact duplicates (SHA-256 of the text) are dropped.
The digest alone decides whether a document is held out, so it is on the same side in every corpus.
Tokens and EOS are packed into records (data/packing.py), which are written as soon as they are
complete. Of conversations they also say which tokens are the assistant's (data/tokenized.py).
Memory holds some digests (data/digests.py), the open records and a few chunks of text, never the
corpus. The files depend on the documents, their order and the arguments, never on the number of
workers.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import LARGEST, IdType, Reading, suffixes_of
from flexolmo_jax.data.chat import CHAT_FILE
from flexolmo_jax.data.digests import open_digests
from flexolmo_jax.data.documents import (
    AS_TEXT,
    HELDOUT,
    INDEX_FILE,
    SURE,
    Found,
    document_files,
    found_in,
    grouped,
    has_documents,
    name_of,
    tell,
)
from flexolmo_jax.data.records import (
    FORMAT,
    INPUTS,
    NAMES,
    Index,
    LeftOut,
    Part,
    Records,
    name_in_index,
    open_records,
    sha256_of,
)
from flexolmo_jax.data.shards import Documents, Packed, Shard, open_writers, pack, shards_of
from flexolmo_jax.data.spread import spread
from flexolmo_jax.data.tokenizer import LOST_BITS, TOKENIZER_FILE, Tokenizer
from flexolmo_jax.data.tokens import Source, TokenRecords, has_tokens, tell_beside
from flexolmo_jax.errors import UserError, printable
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.cache import CACHE_VARIABLE, cache_folder
from flexolmo_jax.storage.files import clear, make_folder, new_directory
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.storage.outputs import UNFINISHED, is_whole
from flexolmo_jax.storage.paths import (
    absolute,
    listing,
    path_of,
    reason,
    size_of,
    takes_paths,
)
from flexolmo_jax.storage.seen import digests_of


@takes_paths
def prepare(  # noqa: PLR0913 - the verb's options
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    seq_len: int,
    out: Path,
    *,
    heldout: float = HELDOUT,
    workers: int | None = None,
    ray: str | None = None,
    reading: Reading = AS_TEXT,
) -> Index:
    """Tokenizes and packs documents into the new directory `out`; returns its index.

    Args:
        inputs: document files or directories of them; `reading` says how they are read.
        seq_len: tokens in a record.
        heldout: the share of documents that are kept for evaluation; a small corpus may have none.
        workers: threads that tokenize (the tokenizer releases Python's lock); by default one for
            each core.
        ray: the address of a Ray cluster to spread the work over, as `connected` takes it; None is
            this process alone. The files are the same.

    Raises:
        UserError: there are no documents or they cannot be read; `out` is not new or empty, or
            cannot be written (a full disk); workers and a cluster are both given. After any error,
            nothing half-written is left.
    """
    _check(seq_len, heldout, workers, ray)
    found = _found(inputs, reading)
    shards = shards_of(found.files, [size_of(file) for file in found.files])
    total, name = sum(shard.bytes for shard in shards), absolute(out).name
    with new_directory(out) as directory:
        _save(tokenizer, directory)
        with bar(f"prepare {name}", total, in_bytes=True) as advance:
            if ray is None:
                documents = functools.partial(Documents, heldout, reading=reading)
                how = {"workers": workers or _cores(), "advance": advance}
                packed = _pack_here(shards, documents, directory, tokenizer, seq_len, how)
            else:
                how = {"address": ray, "advance": advance, "reading": reading}
                packed = spread(shards, heldout, directory, tokenizer, seq_len, **how)
        _check_any(packed, found)
        if tokenizer.chat and any(split.conversations for split in packed.splits.values()):
            tokenizer.chat.save(directory)
        index = _index(name, packed, heldout, directory, tokenizer, seq_len)
        index = dataclasses.replace(index, **_read_as(packed, found, reading))
        index.write(directory)
        _warn(packed, name)
        tell(packed.tally, name, reading)
        return index


def _save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes what decides which tokens a text has."""
    tokenizer.save(directory / TOKENIZER_FILE)
    if tokenizer.start_ids:
        tokenizer.conventions.save(directory)


def _check_any(packed: Packed, found: Found) -> None:
    if not any(split.records for split in packed.splits.values()):
        bad = f" ({packed.tally.bad} are none: {packed.tally.first_bad})" * bool(packed.tally.bad)
        files = ", ".join(map(str, found.files))
        raise UserError(f"no text in {files}: expected documents that are not empty{bad}")


def _check(seq_len: int, heldout: float, workers: int | None, ray: str | None) -> None:
    if not 2 <= seq_len <= LARGEST["max_seq_len"]:
        raise UserError(
            f"got records of {seq_len} tokens, expected 2 or more, {LARGEST['max_seq_len']} at most"
        )
    if not 0 <= heldout < 1:
        raise UserError(f"got a held-out share of {heldout}, expected 0 or more and less than 1")
    if workers and ray is not None:
        raise UserError(
            f"--workers is {workers}: threads of one process; --ray has the cluster's own workers;"
            " leave one of them out"
        )


def open_data(
    path: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    split: Part,
    reading: Reading = AS_TEXT,
    dtype: IdType = "",
) -> Source:
    """The records of a split, or of both: of a prepared directory, documents, or token files.

    Documents are prepared into the cache. Token files have no splits: they are opened whole, those
    without a header as of this dtype. Raises UserError as `has_tokens`, `prepare_cached` and
    `TokenRecords` do, and for the dtype of anything but token files.
    """
    path = ready(path, tokenizer, seq_len, reading, dtype)
    if has_tokens(path):
        tell_beside(path, reading)
        return TokenRecords(path, tokenizer, seq_len, dtype)
    return open_records(path, split)


def ready(
    path: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    reading: Reading = AS_TEXT,
    dtype: IdType = "",
) -> Path:
    """The path itself where it holds token files, else the prepared directory that `open_data`
    opens; it raises as that does."""
    if has_tokens(path):
        return path_of(path)
    if dtype:
        raise UserError(f"{path} has the dtype {dtype}, and is no token file; leave that out")
    return prepare_cached(path, tokenizer, seq_len, reading=reading)


def check_read(reading: Reading, sources: Iterable[Source], text_key: str, separator: str) -> None:
    """Raises UserError where documents are to be read in a way, and none was; takes how the user
    knows its keys."""
    sources = [source for source in sources if isinstance(source, Records)]
    for key, name in (("text_key", text_key), ("separator", separator)):
        value = getattr(reading, key)
        if value != getattr(AS_TEXT, key) and not any(
            getattr(source.index, key) == value for source in sources
        ):
            raise UserError(
                f"{name} is {value!r:.80}, which has no effect: all data are prepared already, and"
                " not so; leave it out, or prepare them again"
            )


def open_heldout(
    path: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    split: Part = "heldout",
    reading: Reading = AS_TEXT,
    dtype: IdType = "",
) -> Source:
    """Records to score: as `open_data`, but prepared ones of any length and tokenizer."""
    if not has_tokens(path) and (path / INDEX_FILE).exists():
        return open_records(path, split)
    return open_data(path, tokenizer, seq_len, split, reading, dtype)


def prepare_cached(
    path: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    cache: Path | None = None,
    reading: Reading = AS_TEXT,
) -> Path:
    """`path` where it is a prepared directory, else documents prepared into a cache.

    The cache is `cache`, or what `cache_folder` finds. The content of the documents, how they are
    read, the tokenizer with its chat template and the length are the key under which a preparation
    is found again. Files that have not changed are not read for it (storage/seen.py). Of several
    processes that ask at once, one prepares and the others wait. A bucket has no locks: where the
    cache is in one, only one process may ask for what is not yet prepared.

    Raises:
        UserError: a directory prepared with another tokenizer, chat template or length; what
            `prepare` raises.
    """
    path = path_of(path)
    if not has_documents(path, reading):
        _check_prepared(path, tokenizer, seq_len)
        return path
    cache = cache or cache_folder()
    key = _key(path, tokenizer, seq_len, cache, reading)
    # The digest names the outer directory and the corpus the inner one, because records are named
    # after their directory.
    entry = cache / "prepared" / key[:32]
    prepared = entry / name_of(path)
    try:
        make_folder(entry)
        with locked(entry):
            if not is_whole(prepared):
                clear(prepared)
                note(f"preparing {path} in {prepared}")
                prepare([path], tokenizer, seq_len, prepared, reading=reading)
    except OSError as error:
        message = (
            f"cannot use the cache {entry}: {reason(error)}; set {CACHE_VARIABLE} to a directory"
            " that can be written"
        )
        raise UserError(message) from error
    return prepared


def _key(path: Path, tokenizer: Tokenizer, seq_len: int, cache: Path, reading: Reading) -> str:
    """The digest of all that decides what a preparation holds."""
    key = hashlib.sha256(f"{FORMAT} {tokenizer.text_digest} {seq_len} {HELDOUT}".encode())
    if tokenizer.chat:
        key.update(f" {tokenizer.chat.digest}".encode())
    files = document_files(path, reading)
    for file, digest in zip(files, digests_of(path, files, cache, sha256_of), strict=True):
        key.update(f" {_way(file, reading)} {digest}".encode())
    for value, usual in ((reading.text_key, AS_TEXT.text_key), (reading.skip_bad, False)):
        if value != usual:
            key.update(f" {value}".encode())
    return key.hexdigest()


def _check_prepared(path: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    index = Index.read(path)
    known = (tokenizer.text_digest, tokenizer.vocab_size)
    if (index.tokenizer_digest, index.vocab_size) != known:
        raise UserError(
            f"{path} was prepared with another tokenizer than the one asked for, or without the"
            " tokens that its texts begin with: prepare it again with that one"
        )
    known = tokenizer.chat.digest if tokenizer.chat else None
    if index.files.get(CHAT_FILE, known) != known:
        raise UserError(
            f"{path} has conversations, prepared with another chat template than the tokenizer's:"
            " prepare it again with that one"
        )
    if index.seq_len != seq_len:
        raise UserError(
            f"{path} has records of {index.seq_len} tokens, not {seq_len}: prepare it again or"
            " set data.seq_len"
        )


def _way(file: Path, reading: Reading) -> str:
    """What, beside its content, says what a file's documents are."""
    if suffixes_of(file.name)[0] == ".txt":
        return f".txt {reading.separator}"
    return file.suffix if file.name.endswith(SURE) else "".join(suffixes_of(file.name))


def _found(inputs: Sequence[Path], reading: Reading) -> Found:
    """All files of documents. Raises UserError for none, and for too many."""
    each = [found_in(path, reading) for path in inputs]
    files = [file for found in each for file in found.files]
    if not files:
        raise UserError("got no documents to prepare: expected files or directories of documents")
    if len(files) > INPUTS:
        raise UserError(
            f"got {len(files)} files of documents, expected at most {INPUTS}: join them, as lines"
            " of .jsonl"
        )
    return Found(files, [one for found in each for one in found.left_out])


def _pack_here(
    shards: Sequence[Shard],
    documents: Callable[[Callable[[bytes], bool]], Documents],
    directory: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    how: dict[str, Any],
) -> Packed:
    """Packs the shards in this process; `how`: workers and advance of `pack`."""
    with (
        open_digests(directory) as digests,
        open_writers(directory, tokenizer, seq_len) as writers,
    ):
        return pack(shards, documents(digests.add), writers, tokenizer, **how)


def _warn(packed: Packed, name: str) -> None:
    """Says what of the documents is not in the records as it is."""
    if packed.empty:
        note(f"left out {packed.empty} documents of {name} that hold nothing but white space")
    if any(split.changed_bytes for split in packed.splits.values()):
        note(
            f"the tokenizer changes texts of {name} (to NFC, for one); bits per byte count the"
            " bytes of the texts themselves"
        )
    if lost := sum(split.lost_bytes for split in packed.splits.values()):
        note(
            f"warning: the tokenizer's vocabulary cannot spell {lost} bytes of {name}; they are"
            f" left out, and count {LOST_BITS:g} bits each in bits per byte"
        )


def _read_as(packed: Packed, found: Found, reading: Reading) -> dict[str, Any]:
    """What an index says of how documents were read, and of what was not."""
    return {
        "text_key": reading.text_key,
        "separator": reading.separator,
        "bad_removed": packed.tally.bad,
        "left_out": [
            LeftOut(
                why, len(names), [printable(name)[:255] for name in dict.fromkeys(names)][:NAMES]
            )
            for why, names in grouped(found.left_out).items()
        ],
    }


def _index(
    name: str,
    packed: Packed,
    heldout: float,
    directory: Path,
    tokenizer: Tokenizer,
    seq_len: int,
) -> Index:
    """Describes a directory that is otherwise complete."""
    names = sorted(listing(directory).keys() - {UNFINISHED})
    return Index(
        format=FORMAT,
        name=name_in_index(name),
        seq_len=seq_len,
        tokenizer_digest=tokenizer.text_digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        heldout=heldout,
        splits=packed.splits,
        inputs=packed.inputs,
        duplicates_removed=packed.duplicates,
        empty_removed=packed.empty,
        files={name: sha256_of(directory / name) for name in names},
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
