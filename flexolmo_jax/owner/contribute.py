"""An owner's one command: prepares documents, trains a pair and packages its expert.

It resumes where it stopped. Private records and checkpoints stay in `<out>.work`, or another place
of the owner's. Only `out` is handed over.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.config import DEFAULTS, Reading, RunConfig, Settings, section_of
from flexolmo_jax.data.changes import changed_documents
from flexolmo_jax.data.documents import has_documents
from flexolmo_jax.data.prepare import open_data, prepare
from flexolmo_jax.data.records import Index, open_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import Contribution, check_expert_name
from flexolmo_jax.exchange.signature import load_key
from flexolmo_jax.storage.files import remove_if_empty
from flexolmo_jax.storage.locks import alone
from flexolmo_jax.storage.outputs import check_new, is_whole
from flexolmo_jax.storage.paths import bucket_of, in_bucket, path_of, takes_paths

from .package import package
from .pair import train_pair

# keys of a run that `contribute` fills in
FILLED = ("run", "pair.anchor", "pair.name", "data.train")
EPOCHS = 2  # passes over the owner's records, where the config does not say how many steps


@takes_paths
def contribute(  # noqa: PLR0913 - the verb's options
    anchor_path: Path,
    documents: Sequence[Path],
    name: str,
    out: Path,
    *,
    settings: Settings = DEFAULTS,
    sign_key: Path | None = None,
    work: Path | None = None,
    allow_hub: bool = False,
    continues: bool = False,
) -> Contribution:
    """Trains an expert on documents against an anchor and packages it.

    Args:
        settings: those of the pair run; its anchor, name and data are filled in.
        sign_key: the owner's private key.
        work: where private records and checkpoints go (default: `<out>.work`).
        allow_hub: see `load_embedder`.
        continues: train the finished run in `work` on; see `train.loop.train`.

    Raises:
        UserError: for a document file that cannot be read, an `out` that holds something, a path
            that is not an anchor, and an `<out>.work` in a bucket that the documents do not come
            from: others may read there.
    """
    anchor = open_anchor(anchor_path)
    check_new(out)
    if sign_key:
        load_key(sign_key)  # raises now for a wrong key, not after hours of training
    option = "--out" if work is None else "--work"
    work = work or _work_beside(out, documents)
    tree = _pair_tree(settings, anchor, name, work, allow_hub)
    run = settings.run(tree, FILLED)  # raises for a wrong config before any document is read
    _check_documents(documents, run.data.reading)
    _check_run(run, anchor)
    with alone(work):
        _prepare(documents, anchor, run, work, option)
        if not settings.say(tree, "train", "steps"):
            run = settings.run(tree, FILLED, f"train.steps={_steps(run, work)}")
        train_pair(run, work / "run", continues=continues)
        return package(work / "run", out, sign_key=sign_key)


def _prepare(
    documents: Sequence[Path], anchor: Artifact, run: RunConfig, work: Path, option: str
) -> None:
    """Prepares the documents, or checks that what `work` holds was made of them."""
    if not is_whole(work / "data"):
        how = {"seq_len": run.data.seq_len, "reading": run.data.reading}
        try:
            prepare(documents, anchor.tokenizer, out=work / "data", **how)
        except UserError:
            remove_if_empty(work)  # an earlier run's directory stays
            raise
    elif changes := changed_documents(work / "data", documents, run.data.reading):
        raise UserError(
            f"{work} was made from other documents ({changes}); delete it, or give a new {option}"
        )


def _work_beside(out: Path, documents: Sequence[Path]) -> Path:
    work = out.with_name(out.name + ".work")
    if in_bucket(work) and any(
        not in_bucket(path) or bucket_of(path) != bucket_of(work) for path in documents
    ):
        raise UserError(
            f"your records would be written to {work}, in a bucket that the documents are not"
            " from; give --work, a place of your own"
        )
    return work


def _check_documents(documents: Sequence[Path], reading: Reading) -> None:
    for path in documents:
        if not has_documents(path, reading):
            raise UserError(
                f"{path} holds no documents; expected .jsonl, .txt or .parquet files (or a"
                " directory of them)"
            )


def _pair_tree(
    settings: Settings, anchor: Artifact, name: str, work: Path, allow_hub: bool
) -> dict[str, Any]:
    """The config of a pair run on these records, as a nested dict."""
    tree = settings.tree({"optim": {"weight_decay": 0.0, "router_z_loss": 1e-3}})
    pair = section_of(tree, "pair") | {"anchor": str(anchor.path), "name": name}
    if allow_hub:
        pair["allow_hub_embedder"] = True
    data = {"seq_len": Index.read(anchor.path / "public").seq_len} | section_of(tree, "data")
    own = {"train": [{"path": str(work / "data"), "name": name}], "eval": []}
    return tree | {"run": "pair", "pair": pair, "data": data | own}


def _check_run(run: RunConfig, anchor: Artifact) -> None:
    """Raises UserError for a name that no expert may have and public text that does not fit."""
    assert run.pair is not None
    check_expert_name(run.pair.name)
    if run.pair.public_share > 0:
        public = path_of(run.pair.public or str(anchor.path / "public"))
        open_data(public, anchor.tokenizer, run.data.seq_len, "train", run.data.reading)


def _steps(run: RunConfig, work: Path) -> int:
    """The steps that read the owner's records EPOCHS times, beside the public ones."""
    assert run.pair is not None
    records = len(open_records(work / "data", "train"))
    own = run.data.batch_size * (1 - run.pair.public_share)
    return max(1, round(EPOCHS * records / own))
