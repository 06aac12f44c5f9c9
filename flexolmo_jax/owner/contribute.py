"""An owner's one command: documents -> prepared records -> pair training -> evaluation ->
contribution. Resumes where it stopped.

The work (private records, checkpoints) stays in `<out>.work`, or another place of the owner's; only
`out` is handed over.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import resolve, says, section_of
from flexolmo_jax.data.documents import document_files, has_documents
from flexolmo_jax.data.prepare import open_data, prepare
from flexolmo_jax.data.records import Index, InputFile, open_records, sha256_of
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import Contribution, check_expert_name
from flexolmo_jax.exchange.signature import load_key
from flexolmo_jax.plain_yaml import read_yaml
from flexolmo_jax.storage.files import remove_if_empty
from flexolmo_jax.storage.outputs import check_new, is_whole
from flexolmo_jax.storage.paths import bucket_of, in_bucket, path_of, size_of

from .package import package
from .pair import train_pair

EPOCHS = 2  # passes over the owner's records, where the config does not say how many steps


def contribute(
    anchor_path: Path,
    documents: Sequence[Path],
    name: str,
    out: Path,
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    sign_key: Path | None = None,
    work: Path | None = None,
    allow_hub: bool = False,
) -> Contribution:
    """Trains an expert on documents against an anchor and packages it.

    `config` is a pair's YAML whose anchor, name and data are filled in here; without it the
    defaults of a pair run apply. `sign_key` is the owner's private key; `work` is where private
    records and checkpoints go (default: `<out>.work`). `allow_hub`: see `load_embedder`. Raises
    UserError where a document file cannot be read, `out` holds something, the anchor is none, or
    `<out>.work` is in a bucket from which the documents do not come: others may read there.
    """
    anchor = open_anchor(anchor_path)
    check_new(out)
    if sign_key:
        load_key(sign_key)  # hours before it is used
    given = work is not None
    if work is None:
        work = out.with_name(out.name + ".work")
        if in_bucket(work) and any(
            not in_bucket(path) or bucket_of(path) != bucket_of(work) for path in documents
        ):
            raise UserError(
                f"your records would be written to {work}, in a bucket that the documents are not"
                " from; give --work, a place of your own"
            )
    for path in documents:
        if not has_documents(path):
            raise UserError(
                f"{path} holds no documents; expected .jsonl, .txt or .parquet files (or a"
                " directory of them)"
            )
    tree: dict[str, Any] = (
        read_yaml(config) if config else {"optim": {"weight_decay": 0.0, "router_z_loss": 1e-3}}
    )
    pair = {"anchor": str(anchor_path), "name": name} | (
        {"allow_hub_embedder": True} if allow_hub else {}
    )
    tree |= {"run": "pair", "pair": section_of(tree, "pair") | pair}
    data = {"seq_len": Index.read(anchor.path / "public").seq_len} | section_of(tree, "data")
    tree["data"] = data | {"train": [{"path": str(work / "data"), "name": name}], "eval": []}
    run = resolve(tree, overrides)  # every mistake in the config shows before any document is read
    assert run.pair is not None
    check_expert_name(run.pair.name)
    if run.pair.public_share > 0:  # so does public text that does not fit
        public = path_of(run.pair.public or str(anchor.path / "public"))
        open_data(public, anchor.tokenizer, run.data.seq_len, "train")
    if not is_whole(work / "data"):
        try:
            prepare(documents, anchor.tokenizer, run.data.seq_len, work / "data")
        except UserError:
            remove_if_empty(work)  # an earlier run's directory stays
            raise
    elif Index.read(work / "data").inputs != _inputs(documents):
        option = "--work" if given else "--out"
        raise UserError(f"{work} was made of other documents; delete it, or give a new {option}")
    if not says(tree, overrides, "train", "steps"):
        records = len(open_records(work / "data", "train"))
        steps = max(
            1, round(EPOCHS * records / (run.data.batch_size * (1 - run.pair.public_share)))
        )
        run = resolve(tree, [*overrides, f"train.steps={steps}"])
    train_pair(run, work / "run")
    return package(work / "run", out, sign_key=sign_key)


def _inputs(documents: Sequence[Path]) -> list[InputFile]:
    files = [file for path in documents for file in document_files(path)]
    return [InputFile(file.name, size_of(file), sha256_of(file)) for file in files]
