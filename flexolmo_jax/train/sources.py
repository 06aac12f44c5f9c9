"""From a config's `data` section to batches and held-out records."""

from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.config import DataConfig, Dataset
from flexolmo_jax.data.chat import CHAT_FILE
from flexolmo_jax.data.documents import AS_TEXT, has_documents
from flexolmo_jax.data.mixture import Batches, mixture
from flexolmo_jax.data.prepare import open_data, ready
from flexolmo_jax.data.records import Records, Split
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source, has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.processes import by_the_first
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


def evaluation_sets(data: DataConfig, extra: Sequence[Dataset] = ()) -> list[Dataset]:
    """What a run is evaluated on: `data.eval`, or else its training sources, and `extra`; but no
    token files that it trains on."""
    trained_on = (*(() if data.eval else data.train), *extra)
    return [*data.eval, *(d for d in trained_on if not has_tokens(path_of(d.path)))]


def open_sources(
    data: DataConfig, tokenizer: Tokenizer, seed: int, extra: Sequence[Dataset] = ()
) -> tuple[Batches, dict[str, Source]]:
    """The training mixture with `extra`, and the held-out records of `data.eval` (of the training
    sources, if that is empty) and `extra`.

    Raw documents are prepared into a cache. Evaluation leaves out sources without held-out records.
    Token files are not split: one is for training or for evaluation as a whole. Raises UserError
    where it is given for both, and for `data.loss: assistant` where `data.train` holds no
    conversation.
    """

    mixed, heldout_sets = (*data.train, *extra), evaluation_sets(data, extra)
    places = _places(data, tokenizer, (*mixed, *heldout_sets))

    def opened(dataset: Dataset, split: Split) -> Source:
        place, length = places[dataset.path], data.seq_len
        return open_data(place, tokenizer, length, split, data.reading, dataset.dtype)

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
    heldout: dict[str, Source] = {}
    for dataset in heldout_sets:
        records = opened(dataset, "heldout")
        if dataset.title in heldout:
            raise UserError(
                f"two evaluation sets are called {dataset.title!r}; give one of them another name"
            )
        if len(records):
            heldout[dataset.title] = records
    _check_reading(data, [*(source for source, _ in training), *heldout.values()])
    return mixture(training, data.batch_size, seed), heldout


def _check_reading(data: DataConfig, sources: Sequence[Source]) -> None:
    """Raises UserError where documents are to be read in a way, and none was."""
    for key in ("text_key", "separator"):
        value, usual = getattr(data, key), getattr(AS_TEXT, key)
        if value != usual and not any(
            isinstance(source, Records) and getattr(source.index, key) == value
            for source in sources
        ):
            raise UserError(
                f"data.{key} is {value!r:.80}, which has no effect: all data are prepared already,"
                " and not so; leave it out, or prepare them again"
            )


def _places(data: DataConfig, tokenizer: Tokenizer, datasets: Sequence[Dataset]) -> dict[str, Path]:
    """Where the records of each path are. Whether raw documents have changed may take reading all
    of them, so that it is asked once."""
    found: dict[str, Path] = {}

    def prepare() -> None:
        for path, dtype in {dataset.path: dataset.dtype for dataset in datasets}.items():
            if path not in found:
                found[path] = ready(path_of(path), tokenizer, data.seq_len, data.reading, dtype)

    by_the_first(prepare)  # into the cache: by one process, not by all at once
    prepare()
    return found
