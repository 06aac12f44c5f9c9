"""Router tuning: after a merge, only router rows and biases are trained, with every expert active.

The data are public text and proxies. Tuned rows bear a trace of every expert that was there. So
each tuning starts from the contributed rows: an expert that left has no part in the next one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flexolmo_jax.artifact import Artifact, Placement, open_artifact
from flexolmo_jax.config import DEFAULTS, RunConfig, Settings, section_of
from flexolmo_jax.data.documents import has_documents
from flexolmo_jax.data.prepare import open_data
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params
from flexolmo_jax.model.tree import partition
from flexolmo_jax.storage.locks import alone, alone_at
from flexolmo_jax.storage.outputs import check_new, is_whole
from flexolmo_jax.storage.paths import absolute, path_of, takes_paths
from flexolmo_jax.storage.placing import WAYS
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.loop import train
from flexolmo_jax.train.sources import check_tokenizer, open_sources

from .merge import apply_tuning, open_model, undo_tuning
from .store import STORE

# keys of a run that `tune` fills in
FILLED = ("run", "router.model", "data.train")
EPOCHS = 2  # passes over all proxies together, where the config does not say how many steps


def is_trained(path: str) -> bool:
    """Whether router tuning trains this parameter of a merged model."""
    return path in ("experts/row", "experts/bias")


@takes_paths
def tune(  # noqa: PLR0913 - the verb's options
    model_path: Path,
    proxies: Mapping[str, Path],
    public: Sequence[Path],
    out: Path,
    *,
    settings: Settings = DEFAULTS,
    work: Path | None = None,
    store_path: Path | None = None,
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Tunes a merged model's router on experts' proxies and public text, an equal part of each.

    It starts from the contributed rows, even if the router has been tuned since.

    Args:
        proxies: documents by the expert's name.
        settings: of the router run; its model and data are filled in.
        work: where the run goes and resumes from (default: `<out>.work`).
        store_path, ways: as in `merge`.

    Raises:
        UserError: for proxies of an expert that the model does not have.
    """
    check_new(out)
    model = open_model(model_path)
    model.check_experts(list(proxies))
    work = work or out.with_name(out.name + ".work")
    store_path = store_path or absolute(model.path).parent / STORE
    start = work / "contributed" if "router" in model.description else model.path
    tree = _router_tree(settings, model, start, proxies, public)
    run = settings.run(tree, FILLED)  # raises for a wrong config before any document is read
    for path in (*proxies.values(), *public):
        has_documents(path, run.data.reading)  # raises where there is no such path
    with alone(work):
        if start != model.path and not is_whole(start):
            undo_tuning(model.path, start, store_path=store_path, ways=ways)
        _check_start(open_artifact(start), model, work)
        if not settings.say(tree, "train", "steps"):
            run = settings.run(tree, FILLED, f"train.steps={_steps(run, model, proxies)}")
        train_router(run, work / "run")
        return apply_tuning(work / "run", out, store_path=store_path, ways=ways)


def _router_tree(
    settings: Settings,
    model: Artifact,
    start: Path,
    proxies: Mapping[str, Path],
    public: Sequence[Path],
) -> dict[str, Any]:
    """The config of a router run from the model `start`, as a nested dict."""
    tree = settings.tree({"optim": {"lr": 2e-3, "weight_decay": 0.1}})
    sources: list[dict[str, Any]] = [
        {"path": str(path), "name": name, "weight": 1.0} for name, path in proxies.items()
    ]
    sources += [{"path": str(path), "weight": 1.0 / len(public)} for path in public]
    length = model.trained_seq_len or min(1024, model.config.max_seq_len)
    data = {"seq_len": length} | section_of(tree, "data")
    filled = {"run": "router", "router": {"model": str(start)}}
    return tree | filled | {"data": data | {"train": sources, "eval": []}}


def _steps(run: RunConfig, model: Artifact, proxies: Mapping[str, Path]) -> int:
    """The steps that read the proxies EPOCHS times; public text counts as one more expert."""
    length = run.data.seq_len
    how: Any = (model.tokenizer, length, "train", run.data.reading)
    opened = (open_data(path, *how) for path in proxies.values())
    share = len(proxies) / (len(proxies) + 1)
    return max(1, round(EPOCHS * sum(map(len, opened)) / (run.data.batch_size * share)))


def _check_start(start: Artifact, model: Artifact, work: Path) -> None:
    """Raises UserError where an earlier command left another model in `work`.

    An expert that has left may be in it.
    """
    for key in ("fingerprint", "members", "model"):
        if start.description[key] != model.description[key]:
            raise UserError(
                f"{work} was made from another model than {model.path}; delete it to start again,"
                " or give another --work"
            )


@takes_paths
@alone_at("out")
def train_router(run: RunConfig, out: Path, *, continues: bool = False) -> dict[str, Any]:
    """Runs a router config; see `train.loop.train`.

    Raises UserError for a model without experts.
    """
    assert run.router is not None  # checked by RunConfig
    model = open_model(path_of(run.router.model))
    if model.config.n_experts == 1:
        raise UserError(f"{model.path} has only the anchor's FFN: there is nothing to route")
    run = run.of_model(model.config, f"the model {model.path}")
    check_tokenizer(run.data, model.tokenizer, model.path)
    batches, heldout = open_sources(run.data, model.tokenizer, run.train.seed)

    def initial(placement: Placement, base: Params) -> Params:
        return jax.tree.map(lambda a: a.astype("float32"), partition(base, is_trained)[0])

    base = {
        "base": str(absolute(model.path)),
        "fingerprint": model.fingerprint,
        "base_sha256": model.description["sha256"],
        "data": [d.title for d in run.data.train],
    }
    job = Job(
        config=run,
        model=model.config,
        is_trained=is_trained,
        initial=initial,
        experts=model.experts,
        tokenizer=model.tokenizer,
        batches=batches,
        heldout=heldout,
        load_base=lambda placement: model.params(placement=placement),
        base=base,
    )
    return train(job, out, continues)
