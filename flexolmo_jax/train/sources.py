"""From a config's `data` section to batches and held-out records."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flexolmo_jax.config import DataConfig, Dataset
from flexolmo_jax.data.chat import CHAT_FILE
from flexolmo_jax.data.documents import has_documents
from flexolmo_jax.data.mixture import Batches, mixture
from flexolmo_jax.data.prepare import check_read, open_data, ready
from flexolmo_jax.data.records import Part, Records, open_records
from flexolmo_jax.data.sample import tell_heldout
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source, TokenRecords, has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.processes import by_the_first
from flexolmo_jax.runtime.progress import note_once
from flexolmo_jax.storage.paths import path_of


def choose_tokenizer(data: DataConfig) -> Tokenizer:
    """The config's tokenizer, or the one that its first prepared directory carries: the first with
    a chat template, if one has conversations."""
    if data.tokenizer:
        return Tokenizer.load(path_of(data.tokenizer))
    paths = [path_of(dataset.path) for dataset in data.train]
    others = (path for path in paths if not has_tokens(path))
    # raises where there is nothing at all
    prepared = [path for path in others if not has_documents(path, data.reading)]
    for path in sorted(prepared, key=lambda path: not (path / CHAT_FILE).exists()):
        return Tokenizer.load(path)
    raise UserError(
        "data.tokenizer is empty and no data.train path is a prepared directory that carries one;"
        " set data.tokenizer"
    )


def check_tokenizer(data: DataConfig, tokenizer: Tokenizer, start: Path) -> None:
    """Raises UserError where the config has another tokenizer than what the run starts from."""
    given = data.tokenizer
    if given and Tokenizer.load(path_of(given)).digest != tokenizer.digest:
        raise UserError(
            f"data.tokenizer {given} is not the tokenizer of {start}, which the run has; leave it"
            " out"
        )


Opened = Callable[[Dataset, Part], Source]


def evaluation_sources(
    data: DataConfig, extra: Sequence[Dataset], opened: Opened, learnt: Iterable[Source]
) -> dict[str, Source]:
    """What a run is evaluated on, by name: `data.eval`, or else its training sources; and `extra`.

    Of a training source these are the held-out records. So they are of a set of `data.eval` of
    which a file is in `learnt`, which the run or its base learns from, and of a prepared directory
    that has some. Any other set is whole. A line tells what is not all of a set of `data.eval`, and
    what is left out, as nothing of it is held out. Raises UserError for a name given twice.
    """
    files = {file for source in (learnt if data.eval else ()) for file in _files(source)}
    found: dict[str, Source] = {}
    for dataset in (*data.eval, *(() if data.eval else data.train), *extra):
        records = opened(dataset, "heldout")
        if dataset in data.eval:
            records = _asked_for(dataset, data, opened, records, files)
        elif isinstance(records, TokenRecords):
            _tell_none(dataset, "all of these token files is for training")
            continue
        if dataset.title in found:
            raise UserError(
                f"two evaluation sets are called {dataset.title!r}; give one of them another name"
            )
        if not isinstance(records, Records) or records.stats.scored_tokens:
            found[dataset.title] = records
        else:
            total = sum(split.documents for split in records.index.splits.values())
            _tell_none(dataset, f"none of its {total:,} documents is held out")
    return found


def _asked_for(
    dataset: Dataset, data: DataConfig, opened: Opened, heldout: Source, learnt: set[str]
) -> Source:
    """What of a set of `data.eval` is scored."""
    if isinstance(heldout, TokenRecords):
        return heldout
    is_split = len(heldout) > 0 and not has_documents(path_of(dataset.path), data.reading)
    if is_split or not learnt.isdisjoint(_files(heldout)):
        tell_heldout(heldout, dataset.path)
        return heldout
    return opened(dataset, "all")


def _files(source: Source) -> set[str]:
    """Digests of the files of documents that a source was prepared from."""
    inputs = source.index.inputs if isinstance(source, Records) else ()
    return {file.sha256 for file in inputs if file.bytes}


def _tell_none(dataset: Dataset, why: str) -> None:
    note_once(
        f"warning: {dataset.path}: {why}, so nothing is evaluated on it; name others in data.eval"
    )


def open_sources(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    extra: Sequence[Dataset] = (),
    learnt: Sequence[Path] = (),
) -> tuple[Batches, dict[str, Source]]:
    """The training mixture with `extra`, and what the run is evaluated on: `evaluation_sources`.

    `learnt`: prepared text that the run's base has learnt from. Raw documents are prepared into a
    cache. Token files are not split: one is for training or for evaluation as a whole. Raises
    UserError where it is given for both, and for `data.loss: assistant` where `data.train` holds no
    conversation.
    """

    mixed = (*data.train, *extra)
    places = _places(data, tokenizer, (*mixed, *data.eval))

    def opened(dataset: Dataset, part: Part) -> Source:
        place, length = places[dataset.path], data.seq_len
        return open_data(place, tokenizer, length, part, data.reading, dataset.dtype)

    training = [(opened(d, "train"), d.weight) for d in mixed]
    if data.loss == "assistant" and not any(
        records.conversations for records, _ in training[: len(data.train)]
    ):
        raise UserError(
            "data.loss is 'assistant', and no source of data.train holds conversations; give one"
            ' with documents of "messages", or leave data.loss out'
        )
    unsplit = {d.path for d in mixed if has_tokens(path_of(d.path))}
    if both := sorted(unsplit & {d.path for d in data.eval}):
        raise UserError(
            f"{both[0]} is in data.train and in data.eval; token files are one or the other: give"
            " others to evaluate on"
        )
    before = (open_records(path, "train") for path in learnt)
    all_learnt = itertools.chain((records for records, _ in training), before)
    heldout = evaluation_sources(data, extra, opened, all_learnt)
    sources = [*(source for source, _ in training), *heldout.values()]
    check_read(data.reading, sources, "data.text_key", "data.separator")
    return mixture(training, data.batch_size, seed), heldout


def _places(data: DataConfig, tokenizer: Tokenizer, datasets: Sequence[Dataset]) -> dict[str, Path]:
    """Where the records of each path are. Whether raw documents have changed may take reading all
    of them, so that it is asked once."""
    found: dict[str, Path] = {}

    def prepare() -> None:
        for dataset in datasets:
            if (path := dataset.path) not in found:
                how = (data.seq_len, data.reading, dataset.dtype)
                found[path] = ready(path_of(path), tokenizer, *how)

    by_the_first(prepare)  # into the cache: by one process, not by all at once
    prepare()
    return found
