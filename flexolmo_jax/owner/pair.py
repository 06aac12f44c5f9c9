"""Training an expert: the anchor, frozen, beside one new expert that starts as a copy of the
anchor's FFN.

Both run for every token, so there is no dispatch. Trained are the new FFN, its router rows and its
bias; nothing else has a gradient or an optimiser state. Public text is mixed in
(`pair.public_share`): from private text alone a row never sees what it should let pass, learns to
fire always, and drowns the other experts after the merge.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.artifact import Artifact, Placement
from flexolmo_jax.config import Dataset, ModelConfig, PairConfig, RunConfig
from flexolmo_jax.data.arrays import read_records
from flexolmo_jax.data.documents import has_documents, read_training_documents
from flexolmo_jax.data.prepare import open_data
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import check_expert_name
from flexolmo_jax.exchange.embedder import domain_embedding, load_embedder
from flexolmo_jax.model import Params, forward
from flexolmo_jax.runtime.processes import by_the_first
from flexolmo_jax.storage.paths import absolute, in_bucket, path_of
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.loop import train
from flexolmo_jax.train.sources import open_sources

HIDDEN_RECORDS = 64  # of each source, where rows start from hidden states


def train_pair(run: RunConfig, out: Path) -> dict[str, Any]:
    """Runs a pair config; see `train.loop.train`."""
    pair = run.pair
    assert pair is not None  # checked by RunConfig
    check_expert_name(pair.name)
    anchor = open_anchor(path_of(pair.anchor))
    tokenizer = anchor.tokenizer
    if (
        run.data.tokenizer
        and Tokenizer.load(path_of(run.data.tokenizer)).digest != tokenizer.digest
    ):
        raise UserError(
            f"data.tokenizer {run.data.tokenizer} is not the tokenizer of {anchor.path}; leave it"
            " out: a pair uses its anchor's"
        )
    model = model_of_pair(run, anchor.config)
    run = dataclasses.replace(run, model=model)
    batches, heldout = open_sources(
        _with_shares(run), tokenizer, run.train.seed, extra=_public(run, anchor)
    )
    row = _row_for_all(pair, run, anchor)

    def initial(placement: Placement) -> Params:
        params = anchor.params(placement=placement)
        make = functools.partial(new_expert, model=model)
        shapes = jax.eval_shape(make, params["experts"], row)
        placed = {name: placement(f"expert/{name}", a.shape) for name, a in shapes.items()}
        return params | {"expert": jax.jit(make, out_shardings=placed)(params["experts"], row)}

    job = Job(
        run,
        model,
        initial,
        is_trained,
        ("anchor", pair.name),
        tokenizer,
        batches,
        heldout,
        contrast=_contrast(run),
        base={"base": str(absolute(anchor.path)), "fingerprint": anchor.fingerprint},
    )
    return train(job, out)


def model_of_pair(run: RunConfig, anchor: ModelConfig) -> ModelConfig:
    """The anchor's architecture, with the new expert's own keys."""
    return dataclasses.replace(
        anchor, router_bias=run.model.router_bias, init_bias=run.model.init_bias
    )


def is_trained(path: str) -> bool:
    """Of a pair's parameters."""
    return path.startswith("expert/")


def new_expert(anchor_experts: Params, row: np.ndarray | None, model: ModelConfig) -> Params:
    """A float32 copy of the anchor's FFN with the given router row, [D] for all layers or [L, D],
    or the anchor's own."""
    L, _, D = anchor_experts["row"].shape
    row = anchor_experts["row"][:, 0] if row is None else row
    # float32 masters: the release dtype is for handing over, not for steps of 1e-4.
    expert = {
        name: jnp.array(anchor_experts[name], jnp.float32, copy=True)
        for name in ("gate", "up", "down")
    }
    expert["row"] = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (L, D))[:, None]
    if model.router_bias:
        expert["bias"] = jnp.full((L, 1), model.init_bias, jnp.float32)
    return expert


def _row_for_all(pair: PairConfig, run: RunConfig, anchor: Artifact) -> np.ndarray | None:
    """The same on every process, of which one reads the documents. Float32 numbers come through
    JSON as they are."""

    def of_the_first() -> list[float] | None:
        row = initial_row(pair, run, anchor)
        return None if row is None else np.asarray(row, np.float32).tolist()

    row = by_the_first(of_the_first)
    return None if row is None else np.asarray(row, np.float32)


def initial_row(pair: PairConfig, run: RunConfig, anchor: Artifact) -> np.ndarray | None:
    """The router row that a pair starts from, [D], or one for each layer, [L, D]; None for the
    anchor's own."""
    if pair.row == "anchor":
        return None
    if pair.row == "hidden":
        return _mean_hidden_states(run, anchor)
    if pair.row == "embedding":
        embedder = load_embedder(
            anchor.path / "embedder", anchor.config.d_model, allow_hub=pair.allow_hub_embedder
        )
        return domain_embedding(embedder, _private_documents(run, anchor.tokenizer))
    width = anchor.config.d_model
    return (
        np.random.default_rng(run.train.seed)
        .normal(0, anchor.config.init_std, width)
        .astype(np.float32)
    )


def _mean_hidden_states(run: RunConfig, anchor: Artifact) -> np.ndarray:
    """What the anchor's routers read of the owner's text, on average, [L, D], at the length of the
    anchor's own rows."""
    params = anchor.params()
    rows = params["experts"]["row"].astype(jnp.float32)

    def read(rows: jax.Array, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        # With one expert a router's logsumexp is row . hidden state, so that its gradient is the
        # hidden state.
        output = forward(
            anchor.config, params | {"experts": params["experts"] | {"row": rows}}, tokens, segments
        )
        return jnp.sum(output.router.log_z * (segments > 0))

    hidden = jnp.zeros_like(rows)
    for dataset in run.data.train:
        records = open_data(path_of(dataset.path), anchor.tokenizer, run.data.seq_len, "train")
        chosen = np.random.default_rng(0).permutation(len(records))[:HIDDEN_RECORDS].tolist()
        batch = [records[i] for i in chosen]
        hidden += jax.grad(read)(
            rows, *(jnp.stack([record[key] for record in batch]) for key in ("tokens", "segments"))
        )
    lengths = [jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (rows, hidden)]
    return np.asarray((hidden * lengths[0] / lengths[1])[:, 0])


def _private_documents(run: RunConfig, tokenizer: Tokenizer):
    """Raw documents as they are; of prepared directories and token files, records as text."""
    for dataset in run.data.train:
        path = path_of(dataset.path)
        if not has_tokens(path) and has_documents(path):
            yield from read_training_documents(path)
        else:
            records = open_data(path, tokenizer, run.data.seq_len, "train")
            chosen = np.random.default_rng(0).permutation(len(records))[:2000].tolist()
            for record in read_records(records.__getitem__, chosen, at_once=in_bucket(path)):
                yield tokenizer.decode(record["tokens"][record["segments"] > 0].tolist())


def _with_shares(run: RunConfig):
    """The owner's sources, scaled to the share that public text leaves."""
    assert run.pair is not None
    total = sum(d.weight for d in run.data.train)
    share = 1 - run.pair.public_share
    return dataclasses.replace(
        run.data,
        train=tuple(
            dataclasses.replace(d, weight=d.weight / total * share) for d in run.data.train
        ),
    )


def _contrast(run: RunConfig) -> tuple[tuple[int, float], ...]:
    """The owner's sources belong to the new expert, public text to the anchor's. Whatever their
    shares, they count as 2 to 3: after a merge public text is what every expert may wrongly take
    its part of."""
    assert run.pair is not None
    own, public = 1 - run.pair.public_share, run.pair.public_share
    if not run.pair.is_contrasted:
        return ()
    return (
        *((1, run.pair.contrast * 0.4 / own) for _ in run.data.train),
        (0, run.pair.contrast * 0.6 / public),
    )


def _public(run: RunConfig, anchor: Artifact) -> list[Dataset]:
    assert run.pair is not None
    if run.pair.public_share == 0:
        return []
    return [
        Dataset(
            path=run.pair.public or str(anchor.path / "public"),
            weight=run.pair.public_share,
            name="public",
        )
    ]
