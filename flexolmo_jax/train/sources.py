"""From a config's `data` section to batches and held-out records."""

from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.config import DataConfig, Dataset
from flexolmo_jax.data.documents import has_documents
from flexolmo_jax.data.mixture import Batches, mixture
from flexolmo_jax.data.prepare import prepare_cached
from flexolmo_jax.data.records import Records, open_records
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError


def choose_tokenizer(data: DataConfig) -> Tokenizer:
    """The config's tokenizer, or the one that its first prepared directory carries."""
    if data.tokenizer:
        return Tokenizer.load(Path(data.tokenizer))
    for dataset in data.train:
        if not has_documents(Path(dataset.path)):  # raises where there is nothing at all
            return Tokenizer.load(Path(dataset.path))
    raise UserError("data.tokenizer is empty and no data.train path is a prepared directory that carries one; set data.tokenizer")


def open_sources(data: DataConfig, tokenizer: Tokenizer, seed: int, extra: Sequence[Dataset] = ()) -> tuple[Batches, dict[str, Records]]:
    """The training mixture, and the held-out records of `data.eval` (of the training sources, if that is empty) and `extra`.

    `extra` joins the training mixture too. Raw documents are prepared into a cache. Sources without held-out records are left out.
    """
    prepared = {d.path: prepare_cached(Path(d.path), tokenizer, data.seq_len) for d in (*data.train, *data.eval, *extra)}
    training = [(open_records(prepared[d.path], "train"), d.weight) for d in (*data.train, *extra)]
    heldout: dict[str, Records] = {}
    for dataset in (*(data.eval or data.train), *extra):
        records = open_records(prepared[dataset.path], "heldout")
        if dataset.title in heldout:
            raise UserError(f"two evaluation sets are called {dataset.title!r}; give one of them another name")
        if len(records):
            heldout[dataset.title] = records
    return mixture(training, data.batch_size, seed), heldout
