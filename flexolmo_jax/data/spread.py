"""Preparing documents on a Ray cluster: the same files as in one process.

    a task a shard:              the digests of its documents
    a hash-partitioned shuffle:  of equal digests, all but the first are duplicates
    a task a shard:              packed records, in files of its own
    the command:                 one file a split, the shards one after another

The first of some equal documents is the one that comes first in the order of files and lines.
Which worker does what, and when, changes nothing. Each attempt at a shard writes into a folder of
its own, so that a worker that was taken for lost cannot disturb the next attempt.
"""

import functools
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.config import Reading
from flexolmo_jax.data.chat import Chat
from flexolmo_jax.data.documents import AS_TEXT, Tally, digest_of, documents_in
from flexolmo_jax.data.over_shards import Columns, Files, everywhere, files_of, mapped, seen
from flexolmo_jax.data.records import SPLITS, InputFile, Split, SplitIndex
from flexolmo_jax.data.shards import Documents, Packed, Shard, is_blank, open_writers, pack
from flexolmo_jax.data.split_writer import join_records
from flexolmo_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from flexolmo_jax.runtime.cluster import connected, on_workers, shared_path_error
from flexolmo_jax.storage.files import discard, make_folder
from flexolmo_jax.storage.paths import path_of

PARTITIONS = 200  # of the digests at most; a partition of a billion documents has 280 MB
ROWS = 1 << 16  # digests that a worker holds before it hands them on
_HERE = "flexolmo_jax.data.spread"
_WORDS = ("a", "b", "c", "d")  # a digest as four numbers of 64 bits


def spread(  # noqa: PLR0913 - as `pack`, and where the cluster is
    shards: Sequence[Shard],
    heldout: float,
    directory: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    address: str,
    advance: Callable[[int], object],
    reading: Reading = AS_TEXT,
) -> Packed:
    """Writes the records of all shards into a directory that has the tokenizer already.

    Raises what `connected` raises, and UserError where a worker does not see a path.
    """
    found: dict[int, dict[str, Any]] = {}
    if tokenizer.chat:
        make_folder(directory / "shards")
        tokenizer.chat.save(directory / "shards")
    with connected(address):
        for row in _dataset(shards, heldout, directory, seq_len, reading).iter_rows():
            found[row["shard"]] = json.loads(row["packed"])
            advance(shards[row["shard"]].bytes)
    each = [found[shard.number] for shard in shards]
    parts: dict[Split, dict[Path, SplitIndex]] = {
        split: {
            directory / "shards" / one["folder"]: SplitIndex(**one["splits"][split]) for one in each
        }
        for split in SPLITS
    }
    for split in SPLITS:
        join_records(directory, parts[split], split, tokenizer, seq_len)
    discard(directory / "shards")
    tally = Tally()
    for one in each:
        tally.add(Tally(**one["tally"]))
    return Packed(
        {split: _sum(parts[split].values(), seq_len) for split in SPLITS},
        [InputFile(**file) for one in each for file in one["inputs"]],
        sum(one["duplicates"] for one in each),
        sum(one["empty"] for one in each),
        tally,
    )


def _dataset(
    shards: Sequence[Shard], heldout: float, directory: Path, seq_len: int, reading: Reading
) -> Any:
    """The rows {"shard": number, "packed": what `write_shard` says}, in any order."""
    files, partitions = files_of(shards), min(len(shards), PARTITIONS)
    how: dict[str, Any] = {"files": files, "reading": reading}
    digests = mapped(shards, on_workers(_HERE, "read_digests"), partitions=partitions, **how)
    duplicates = digests.groupby("partition", partitions).map_groups(
        on_workers(_HERE, "find_duplicates")
    )
    # a row of each shard, so that those without duplicates are there too
    all_of_them = mapped(shards, on_workers(_HERE, "no_duplicate"))
    how |= {"directory": everywhere(directory), "heldout": heldout}
    return (
        duplicates.union(all_of_them)
        .groupby("shard", len(shards))
        .map_groups(on_workers(_HERE, "write_shard"), fn_kwargs=how | {"seq_len": seq_len})
    )


# ---- on workers ----


def read_digests(
    batch: Columns, files: Files, reading: Reading, partitions: int
) -> Iterator[Columns]:
    """The digests of a shard's documents that are not blank, each with its place and partition."""
    for shard in batch["shard"].tolist():
        paths = seen(files[shard])
        found = (one for path in paths for one in documents_in(path, None, reading, Tally()))
        texts = (one.text for one in found if not is_blank(one.text))
        for first in itertools.count(step=ROWS):
            digests = b"".join(map(digest_of, itertools.islice(texts, ROWS)))
            words = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 4)
            yield dict(zip(_WORDS, words.T, strict=True)) | {
                # other bits than those that decide what is held out
                "partition": (words[:, 1] % np.uint64(partitions)).astype(np.int64),
                "shard": np.full(len(words), shard, np.int64),
                "row": np.arange(first, first + len(words), dtype=np.int64),
            }
            if len(words) < ROWS:
                break


def find_duplicates(partition: Columns) -> Columns:
    """The places of documents that are equal to an earlier one."""
    keys = [partition[name] for name in (*_WORDS, "shard", "row")]
    order = np.lexsort(keys[::-1])
    words = np.stack([key[order] for key in keys[: len(_WORDS)]])
    again = order[1:][(words[:, 1:] == words[:, :-1]).all(axis=0)]
    return {name: partition[name][again] for name in ("shard", "row")}


def no_duplicate(batch: Columns) -> Columns:
    """As `find_duplicates`, of shards without any."""
    return {"shard": batch["shard"], "row": np.full(len(batch["shard"]), -1, np.int64)}


def write_shard(
    duplicates: Columns,
    files: Files,
    reading: Reading,
    directory: str,
    heldout: float,
    seq_len: int,
) -> Columns:
    """Writes the records of a shard, given its duplicates' places, into a new folder."""
    number, place = int(duplicates["shard"][0]), path_of(directory)
    again, row = set(duplicates["row"].tolist()), itertools.count()
    documents = Documents(heldout, lambda _: next(row) not in again, reading)
    shard = Shard(number, seen(files[number]), 0)
    tokenizer = _tokenizer(place)
    folder = place / "shards" / f"{number:05}-{uuid.uuid4().hex[:8]}"
    make_folder(folder)
    with open_writers(folder, tokenizer, seq_len, bare=True) as writers:
        packed = pack([shard], documents, writers, tokenizer)
    told = {"folder": folder.name} | packed._asdict()
    told["splits"] = {split: asdict(index) for split, index in packed.splits.items()}
    told["tally"] = asdict(packed.tally)
    told["inputs"] = [asdict(file) for file in packed.inputs]
    return {"shard": np.array([number]), "packed": np.array([json.dumps(told)])}


@functools.lru_cache(1)
def _tokenizer(directory: Path) -> Tokenizer:
    if not (directory / TOKENIZER_FILE).exists():
        raise shared_path_error(directory)
    tokenizer = Tokenizer.load(directory)
    tokenizer.chat = Chat.load(directory / "shards")
    return tokenizer


def _sum(parts: Iterable[SplitIndex], seq_len: int) -> SplitIndex:
    """What the records of all shards hold."""
    each = [asdict(part) for part in parts]
    counts = {name: sum(part[name] for part in each) for name in each[0] if name != "fill"}
    return SplitIndex.of(seq_len, **counts)
