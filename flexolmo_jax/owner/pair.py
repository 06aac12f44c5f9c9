"""Training an expert: the frozen anchor beside one new expert, a copy of the anchor's FFN at first.

Both run for every token, so there is no dispatch. Only the new FFN, its router rows and its bias
are trained; nothing else has a gradient or an optimiser state. Public text is mixed in
(`pair.public_share`). With private text alone, a row never sees tokens that it should leave to
others. It would learn to win everywhere, and take the other experts' tokens after the merge.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.artifact import Artifact, Placement, placement_on
from flexolmo_jax.config import Dataset, ModelConfig, PairConfig, RunConfig, check_microbatch
from flexolmo_jax.data.arrays import read_records
from flexolmo_jax.data.documents import has_documents, read_training_documents
from flexolmo_jax.data.prepare import open_data
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import has_tokens
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import check_expert_name
from flexolmo_jax.exchange.embedder import domain_embedding, load_embedder
from flexolmo_jax.integrity import MATRICES
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model import Params, forward
from flexolmo_jax.runtime.processes import by_the_first, compile_for_all
from flexolmo_jax.runtime.sharding import make_mesh, put_whole_batch, replicated
from flexolmo_jax.storage.locks import alone_at
from flexolmo_jax.storage.paths import absolute, in_bucket, path_of, takes_paths
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.loop import train
from flexolmo_jax.train.sources import check_tokenizer, open_sources

HIDDEN_RECORDS = 64  # of each source, for rows that start from hidden states
TEXT_RECORDS = 2000  # of each source without raw documents, for rows that start from an embedding


@takes_paths
@alone_at("out")
def train_pair(run: RunConfig, out: Path, *, continues: bool = False) -> dict[str, Any]:
    """Runs a pair config; see `train.loop.train`."""
    pair = run.pair
    assert pair is not None  # checked by RunConfig
    check_expert_name(pair.name)
    anchor = open_anchor(path_of(pair.anchor))
    tokenizer = anchor.tokenizer
    check_tokenizer(run.data, tokenizer, anchor.path)
    model = model_of_pair(run, anchor.config)
    run = run.of_model(model, f"the anchor {anchor.path}")
    extra = _public(run, anchor)
    how: dict[str, Any] = {"extra": extra, "learnt": [anchor.path / "public"]}
    batches, heldout = open_sources(_with_shares(run), tokenizer, run.train.seed, **how)

    def initial(placement: Placement, base: Params) -> Params:
        row = _row_for_all(pair, run, anchor, base)
        make = functools.partial(new_expert, model=model)
        shapes = jax.eval_shape(make, base["experts"], row)
        placed = {name: placement(f"expert/{name}", a.shape) for name, a in shapes.items()}
        return {"expert": jax.jit(make, out_shardings=placed)(base["experts"], row)}

    job = Job(
        config=run,
        model=model,
        is_trained=is_trained,
        initial=initial,
        experts=("anchor", pair.name),
        tokenizer=tokenizer,
        batches=batches,
        heldout=heldout,
        contrast=_contrast(run),
        load_base=lambda placement: anchor.params(placement=placement),
        base={"base": str(absolute(anchor.path)), "fingerprint": anchor.fingerprint},
    )
    return train(job, out, continues)


def model_of_pair(run: RunConfig, anchor: ModelConfig) -> ModelConfig:
    """The anchor's architecture, with the new expert's own keys."""
    return dataclasses.replace(
        anchor, router_bias=run.model.router_bias, init_bias=run.model.init_bias
    )


def is_trained(path: str) -> bool:
    """Whether pair training trains this parameter."""
    return path.startswith("expert/")


def new_expert(anchor_experts: Params, row: np.ndarray | None, model: ModelConfig) -> Params:
    """A float32 copy of the anchor's FFN with this router row, or else the anchor's own.

    The row is [D], the same in all layers, or [L, D].
    """
    L, _, D = anchor_experts["row"].shape
    row = anchor_experts["row"][:, 0] if row is None else row
    # In float32: steps of 1e-4 would be lost in bfloat16, the usual release dtype.
    expert = {leaf: jnp.array(anchor_experts[leaf], jnp.float32, copy=True) for leaf in MATRICES}
    expert["row"] = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (L, D))[:, None]
    if model.router_bias:
        expert["bias"] = jnp.full((L, 1), model.init_bias, jnp.float32)
    return expert


def _row_for_all(
    pair: PairConfig, run: RunConfig, anchor: Artifact, base: Params
) -> np.ndarray | None:
    """The initial row, the same on every process.

    All processes take part in computing hidden states. Other rows are made by the first, which
    alone reads the documents. It sends them as JSON, which keeps float32 numbers exactly.
    """

    def of_the_first() -> list[float] | None:
        row = initial_row(pair, run, anchor)
        return None if row is None else np.asarray(row, np.float32).tolist()

    if pair.row == "hidden":
        return initial_row(pair, run, anchor, base)
    row = by_the_first(of_the_first)
    return None if row is None else np.asarray(row, np.float32)


def initial_row(
    pair: PairConfig, run: RunConfig, anchor: Artifact, base: Params | None = None
) -> np.ndarray | None:
    """The router row that a pair starts from, [D] or [L, D]; None for the anchor's own.

    `base`: the anchor's parameters on the run's mesh, where they are in memory already.
    """
    if pair.row == "anchor":
        return None
    if pair.row == "hidden":
        return _mean_hidden_states(run, anchor, base)
    if pair.row == "embedding":
        embedder = load_embedder(
            anchor.path / "embedder", anchor.config.d_model, allow_hub=pair.allow_hub_embedder
        )
        anchor.ensure()  # again, now that it is read
        return domain_embedding(embedder, _private_documents(run, anchor.tokenizer))
    random = np.random.default_rng(run.train.seed)
    return random.normal(0, anchor.config.init_std, anchor.config.d_model).astype(np.float32)


def _mean_hidden_states(run: RunConfig, anchor: Artifact, base: Params | None) -> np.ndarray:
    """The mean input of the anchor's routers on the owner's text, [L, D].

    It is scaled to the length of the anchor's own rows. The anchor lies on the run's mesh, in its
    own dtype, and reads a microbatch at a time. So of several processes each has to call this.
    Raises UserError where a microbatch does not divide over the mesh.
    """
    mesh, size = make_mesh(run.mesh), run.data.batch_size // run.train.accumulate
    check_microbatch(run, mesh.shape)
    params = base or anchor.params(placement=placement_on(mesh, anchor.config))
    rows = anchor.arrays()["experts/row"].astype(np.float32)[:]
    summed, hidden = _summed_hidden_states(anchor.config, mesh, run.kernels), np.zeros_like(rows)
    for number, batch in enumerate(_first_records(run, anchor.tokenizer, size)):
        placed = [put_whole_batch(mesh, array) for array in batch]
        if number == 0:
            compile_for_all(summed, params, rows, *placed)
        hidden += np.asarray(summed(params, rows, *placed))
    row_length, length = (np.linalg.norm(a, axis=-1, keepdims=True) for a in (rows, hidden))
    return (hidden * row_length / length)[:, 0]


def _first_records(run: RunConfig, tokenizer: Tokenizer, size: int) -> Iterator[np.ndarray]:
    """Tokens and segments [2, size, T] of HIDDEN_RECORDS records of each source, always the same.

    A source's last batch is filled up with padding: segment 0.
    """
    for dataset in run.data.train:
        path, length, reading = path_of(dataset.path), run.data.seq_len, run.data.reading
        records = open_data(path, tokenizer, length, "train", reading, dataset.dtype)
        chosen = np.random.default_rng(0).permutation(len(records))[:HIDDEN_RECORDS].tolist()
        for start in range(0, len(chosen), size):
            batch = np.zeros((2, size, run.data.seq_len), np.int32)
            for place, number in enumerate(chosen[start : start + size]):
                record = records[number]
                batch[:, place] = record["tokens"], record["segments"]
            yield batch


def _summed_hidden_states(
    model: ModelConfig, mesh: Mesh, kernels: Kernels
) -> Callable[..., jax.Array]:
    """The jitted (params, rows, tokens, segments) -> sums of the routers' inputs, as `rows`
    [L, 1, D] in float32."""

    def summed_log_z(
        rows: jax.Array, params: Params, tokens: jax.Array, segments: jax.Array
    ) -> jax.Array:
        # With one expert, a router's logsumexp is row . hidden state: its gradient with respect to
        # the row is the hidden state.
        with_rows = params | {"experts": params["experts"] | {"row": rows}}
        how: dict[str, Any] = {"remat": "full", "mesh": mesh, "kernels": kernels}
        output = forward(model, with_rows, tokens, segments, **how)
        return jnp.sum(output.router.log_z * (segments > 0))

    return jax.jit(
        lambda params, rows, *batch: jax.grad(summed_log_z)(rows, params, *batch),
        out_shardings=replicated(mesh),  # every process reads them
    )


def _private_documents(run: RunConfig, tokenizer: Tokenizer):
    """The text of raw documents, and of records of prepared directories and token files."""
    for dataset in run.data.train:
        path = path_of(dataset.path)
        if not has_tokens(path) and has_documents(path, run.data.reading):
            yield from read_training_documents(path, reading=run.data.reading)
        else:
            length, reading = run.data.seq_len, run.data.reading
            records = open_data(path, tokenizer, length, "train", reading, dataset.dtype)
            chosen = np.random.default_rng(0).permutation(len(records))[:TEXT_RECORDS].tolist()
            for record in read_records(records.__getitem__, chosen, at_once=in_bucket(path)):
                yield tokenizer.decode(record["tokens"][record["segments"] > 0].tolist())


def _with_shares(run: RunConfig):
    """The run's data, with the owner's sources scaled to the share that public text leaves."""
    assert run.pair is not None
    total = sum(d.weight for d in run.data.train)
    share = 1 - run.pair.public_share
    train = (dataclasses.replace(d, weight=d.weight / total * share) for d in run.data.train)
    return dataclasses.replace(run.data, train=tuple(train))


def _contrast(run: RunConfig) -> tuple[tuple[int, float], ...]:
    """By source: the expert that its tokens belong to, and how much they count in the loss.

    The owner's sources belong to the new expert, public text to the anchor's. Divided by their
    shares of a batch, the two sides count 0.4 and 0.6. Public text counts more, because after a
    merge every expert could wrongly take some of it.
    """
    pair = run.pair
    assert pair is not None
    if not pair.is_contrasted:
        return ()
    own = 1, pair.contrast * 0.4 / (1 - pair.public_share)
    public = 0, pair.contrast * 0.6 / pair.public_share
    return (*(own for _ in run.data.train), public)


def _public(run: RunConfig, anchor: Artifact) -> list[Dataset]:
    """Public text as a source of its share; none if that is 0."""
    assert run.pair is not None
    share = run.pair.public_share
    if share == 0:
        return []
    path = run.pair.public or str(anchor.path / "public")
    return [Dataset(path=path, weight=share, name="public")]
