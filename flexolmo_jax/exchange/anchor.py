"""Publishing an anchor: a checkpoint becomes the frozen model that every owner trains against.

The weights are cast once to the release dtype, without the optimiser's state. Router row 0 becomes
the mean embedding of public text. Tokenizer, chat template, embedder and a sample of packed public
text are written beside the weights.

The fingerprint (integrity.py) is a digest of the architecture, of every tensor's name, dtype, shape
and bytes (router row 0 too), of tokenizer, chat template, its publisher's conventions, embedder and
public training records. An expert fits one fingerprint only.
"""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.artifact import Artifact, open_artifact, write_description
from flexolmo_jax.config import Reading, read_config, to_dict
from flexolmo_jax.data.documents import AS_TEXT, HELDOUT, name_of, read_training_documents
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import embedder_digest, fingerprint_of, public_digest
from flexolmo_jax.model import logical_axes
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage import weights
from flexolmo_jax.storage.files import new_directory, write_new
from flexolmo_jax.storage.outputs import check_new_file
from flexolmo_jax.storage.paths import in_bucket, takes_paths

from .embedder import Embedder, domain_embedding, fit_embedder, load_embedder
from .sampling import sampled

RELEASE_DTYPES = ("bfloat16", "float32")


@takes_paths
def publish(  # noqa: PLR0913 - the verb's options
    dense_path: Path,
    public: Sequence[Path],
    out: Path,
    *,
    embedder: str = "tfidf",
    dtype: str = "bfloat16",
    seq_len: int | None = None,
    heldout: float = HELDOUT,
    checkpoint_name: str = "last",
    reading: Reading = AS_TEXT,
) -> Artifact:
    """Makes an anchor of a dense run or model, or of the first expert of an imported model.

    An imported model's router rows are kept. Models are read a shard at a time, runs a parameter.

    Args:
        public: documents (`reading`: how they are read) for the embedder and router row 0. They go
            with the anchor as packed records, so that owners have text to contrast their own with.
        embedder: "tfidf", "minilm" or a sentence-transformers model; `dtype`: of the weights.
        seq_len: tokens of a public record (default: the run's); `heldout`: the share of public
            documents that is for evaluation only.
        checkpoint_name: the checkpoint of a run: "last", "best", or a step.

    Raises:
        UserError: for a model with contributed experts, and for an unknown dtype.
    """
    if dtype not in RELEASE_DTYPES:
        raise UserError(f"--dtype is {dtype!r}; expected one of {', '.join(RELEASE_DTYPES)}")
    artifact = _dense(dense_path)
    with new_directory(out) as directory:
        artifact.tokenizer.save(directory)
        length = seq_len or _trained_seq_len(dense_path) or min(artifact.config.max_seq_len, 1024)
        how: Any = {"heldout": heldout, "reading": reading}
        prepare(public, artifact.tokenizer, length, directory / "public", **how)
        fitted = _fitted(embedder, directory / "embedder", _documents(public, **how), artifact)
        row = _row_0(directory / "embedder", _documents(public, **how))
        arrays = _arrays(artifact, checkpoint_name, row)
        released = {path: array.astype(dtype) for path, array in arrays.items()}
        description = _describe(directory, artifact, released, fitted)
        write_description(directory, description | {"public": [name_of(path) for path in public]})
        artifact.ensure()  # again: another directory may have got its name meanwhile
        if not in_bucket(out):  # here, as others may put something else in its place
            open_artifact(directory).remember()
    fingerprint, count = description["fingerprint"], sum(a.size for a in released.values())
    note(f"published {out}: fingerprint {fingerprint[:16]}, {count:,} parameters in {dtype}")
    anchor = open_artifact(out)
    if in_bucket(out):  # where the mark of an unfinished directory was one of its files
        anchor.remember()
    return anchor


def _dense(path: Path) -> Artifact:
    """The run or model at `path`. Raises UserError unless an anchor can be made of it."""
    artifact = open_artifact(path)
    is_imported = artifact.kind == "model" and artifact.fingerprint is None
    if artifact.is_pair or (artifact.config.n_experts != 1 and not is_imported):
        raise UserError(
            f"{path} has experts {', '.join(artifact.experts)}; an anchor is published from a"
            " dense run or model"
        )
    return artifact


def _fitted(name: str, out: Path, texts: Iterator[str], artifact: Artifact) -> Embedder:
    """An embedder that is fitted on public text, and written."""
    embedder = fit_embedder(name, texts, artifact.config.d_model)
    embedder.save(out)
    return embedder


def _row_0(embedder: Path, public: Iterator[str]) -> np.ndarray:
    """By the embedder as owners will load it: their rows and row 0 must come from the same one."""
    loaded = load_embedder(embedder, allow_hub=True)
    return domain_embedding(loaded, public)


def _arrays(artifact: Artifact, checkpoint_name: str, row: np.ndarray) -> dict[str, Any]:
    """The anchor's arrays: a dense model's with this router row, or those of an imported one."""
    arrays = artifact.arrays(checkpoint_name)
    if artifact.config.n_experts == 1:
        return arrays | {"experts/row": np.broadcast_to(row, arrays["experts/row"].shape)}
    return {
        path: dataclasses.replace(a, expert=0) if path.startswith("experts/") else a
        for path, a in arrays.items()
    }


def _describe(
    directory: Path, artifact: Artifact, released: dict[str, Any], embedder: Embedder
) -> dict[str, Any]:
    """Writes the weights, and returns the description of all that is in the directory."""
    config = dataclasses.replace(artifact.config, n_experts=1, n_active=1)
    tensors = {
        path: {"dtype": str(a.dtype), "shape": list(a.shape)} for path, a in released.items()
    }
    axes = flatten(logical_axes(config))
    for path, digest in weights.save(directory / "weights", released, axes).items():
        tensors[path]["sha256"] = digest
    parts = {
        "model": to_dict(config),
        "tensors": tensors,
        **artifact.tokenizer.digests,
        "embedder": embedder_digest(directory / "embedder"),
        "public": public_digest(directory / "public"),
    }
    name = {"name": embedder.name, "version": embedder.version}
    return {
        "kind": "anchor",
        "model": parts["model"],
        "experts": ["anchor"],
        "tensors": tensors,
        **artifact.tokenizer.digests,
        "embedder": {"sha256": parts["embedder"]} | name,
        "public_sha256": parts["public"],
        "fingerprint": fingerprint_of(parts),
    }


@takes_paths
def open_anchor(path: Path) -> Artifact:
    """Opens a published anchor for use.

    Raises UserError for anything else, and where its bytes are not those of its fingerprint.
    """
    artifact = open_artifact(path)
    if artifact.kind != "anchor":
        raise UserError(
            f"{path} is a {artifact.kind}; expected a published anchor (`flexolmo publish` makes"
            " one)"
        )
    artifact.ensure()
    return artifact


@takes_paths
def embed_domain(
    anchor_path: Path,
    documents: Sequence[Path],
    out: Path,
    *,
    allow_hub: bool = False,
    ray: str | None = None,
    reading: Reading = AS_TEXT,
) -> np.ndarray:
    """Writes (as .npy) and returns the mean embedding of documents, float32 [D].

    The embedder is the anchor's; for `allow_hub` see `load_embedder`. `ray`: the address of a
    cluster that reads the documents, as `connected` takes it. The bytes are the same.
    `reading`: how the documents are read.
    """
    anchor = open_anchor(anchor_path)
    check_new_file(out)
    embedder = load_embedder(anchor.path / "embedder", anchor.config.d_model, allow_hub=allow_hub)
    anchor.ensure()  # again, now that it is read
    if ray is None:
        texts = _documents(documents, HELDOUT, reading)
    else:
        texts = sampled(documents, HELDOUT, reading, ray)
    embedding = domain_embedding(embedder, texts)
    content = io.BytesIO()
    np.save(content, embedding)
    write_new(out, content.getvalue())
    return embedding


def _documents(paths: Sequence[Path], heldout: float, reading: Reading) -> Iterator[str]:
    for path in paths:
        yield from read_training_documents(path, heldout, reading)


def _trained_seq_len(path: Path) -> int | None:
    config = path / "config.yaml"
    return read_config(config).data.seq_len if config.exists() else None
