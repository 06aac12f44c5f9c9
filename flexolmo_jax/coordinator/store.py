"""The store: every anchor and expert that was admitted, once, verified on the way in and never changed after.

    STORE/objects/<digest>/weights/   an anchor's, or one expert's as a model's with that expert alone; laid out as in weights.py
    STORE/models/<digest>.json        where the models are that were composed of them

An object is named by what it holds. Models are composed of its files: by hard link, reflink or copy, or through memory where another
layout is wanted. A model stands on its own: removing the store, or an object that `gc` finds no model to need, changes none.

In a bucket the same files come by copies that the object store makes itself. It has no locks: there `gc` leaves alone what changed within
the last hour, and should not run while somebody merges.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.artifact import Artifact, canonical_json, open_artifact, read_sealed, sealed_json
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import check_tensors, layouts
from flexolmo_jax.exchange.contribution import MATRICES, Contribution, leaf_of, name_of_tensor
from flexolmo_jax.storage.files import (
    WAYS,
    abandoned,
    before_change,
    is_settled,
    is_whole,
    locked,
    new_directory,
    place,
    remove,
    write_text,
)
from flexolmo_jax.storage.paths import absolute, children, copy_objects, in_bucket, listing, path_of
from flexolmo_jax.storage.weights import Box, Index, Layout, Reader, Writer, metadata_files, shard_name

STORE = "flexolmo-store"
LAYOUT = 2  # counted up whenever weights.py lays out the same tensors otherwise
Entries = Mapping[str, Mapping[str, Any]]  # dtype, shape and SHA-256 of tensors, by path


class Source(NamedTuple):
    """An expert in a directory of weights."""

    weights: Path
    index: int


class Store:
    """A directory. `shared` and `alone` hold its lock: composing needs objects to stay, `gc` needs nobody to compose."""

    def __init__(self, path: Path):
        self.path = absolute(path)
        self._objects, self._models = self.path / "objects", self.path / "models"

    @classmethod
    def existing(cls, path: Path) -> "Store":
        """Raises UserError where there is none."""
        if not (path / "objects").is_dir():
            raise UserError(f"{path} is not a store; expected the directory that `flexolmo merge` made (flexolmo-store, beside the model)")
        return cls(path)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Makes the store where there is none; one that was made for nothing goes with the error."""
        if in_bucket(self.path):
            yield
            return
        is_new = not self._objects.exists()
        try:
            for directory in (self._objects, self._models):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the store {self.path}: {error.strerror}; give another place with --store") from error
        try:
            with locked(self._objects, shared=True):
                yield
        except BaseException:
            with contextlib.suppress(OSError), locked(self._objects, wait=False):
                if is_new:
                    shutil.rmtree(self.path)
            raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        with locked(self._objects):
            yield

    def anchor(self, anchor: Artifact) -> Path:
        """The weights of a published anchor, taken in if they are not here yet.

        Raises UserError for bytes that are not the published ones.
        """
        tensors = anchor.description["tensors"]

        def fill(directory: Path) -> None:
            check_tensors(anchor)
            compose(directory, layouts(anchor.config, tensors), anchor.path / "weights", [Source(anchor.path / "weights", 0)])

        return self._object(anchor_key(tensors), fill)

    def held(self, key: str, what: str) -> Path:
        """The weights of an object that was taken in earlier. Raises UserError where it is not here (any more)."""
        if not self.holds(key):
            raise UserError(
                f"the store {self.path} does not hold {what}; give the one that the model was merged with (--store), or merge again"
            )
        return self._objects / key / "weights"

    def expert(self, contribution: Contribution) -> Path:
        """The weights of a contribution, taken in if they are not here yet. Raises UserError as `Contribution.tensors` does."""
        return self._object(expert_key(contribution.manifest["tensors"]), lambda directory: _ingest(contribution, directory))

    def register(self, model: Path) -> None:
        """Remembers where a model is about to be."""
        model = absolute(model)
        entry = self._models / f"{hashlib.sha256(str(model).encode()).hexdigest()[:16]}.json"
        write_text(entry, sealed_json({"path": str(model)}))

    def models(self) -> list[Artifact]:
        """Those that are still where they were composed."""
        found = []
        for path in self._registered().values():
            try:
                found.append(open_artifact(path))
            except UserError:
                continue
        return found

    def holds(self, key: str) -> bool:
        return is_whole(self._objects / key)

    def verify(self) -> int:
        """Reads every object; returns how many. Raises UserError naming the first that is not what its name says."""
        self._registered()
        with self.shared():
            objects = self._whole()
            for path in objects:
                _check_object(path)
        return len(objects)

    def info(self) -> dict[str, Any]:
        """What is here: objects, their bytes, and the models that are made of them."""
        objects = self._whole()
        size = sum(file.size for path in objects for file in listing(path).values())
        models = {str(model.path): list(model.experts) for model in self.models()}
        return {"kind": "store", "objects": len(objects), "bytes": size, "models": models}

    def gc(self) -> dict[str, Any]:
        """Removes objects that no registered model is made of, and what killed processes left, here and beside those models."""
        with self.alone():
            needed = {key for model in self.models() for key in keys_of(model)}
            removed = [path for path in self._whole() if path.name not in needed and is_settled(path)]
            left = {path for directory in (self._objects, self._models) for path in abandoned(directory)}
            for entry, model in self._registered().items():
                left |= set(abandoned(model.parent, model.name))
                if not model.exists() or model in left:
                    before_change("remove", entry)
                    entry.unlink()
            size = sum(file.size for path in (*removed, *left) for file in listing(path).values())
            for path in (*removed, *left):
                remove(path) if path.is_dir() else path.unlink()
            kept = [path.name for path in children(self._objects)]
        return {"store": str(self.path), "removed": [p.name for p in removed], "leftovers": len(left), "bytes": size, "kept": kept}

    def _whole(self) -> list[Path]:
        """The objects that are there, and not what somebody is writing."""
        return [path for path in children(self._objects) if not path.name.startswith(".") and is_whole(path)]

    def _registered(self) -> dict[Path, Path]:
        found = {}
        for entry in children(self._models):
            if entry.suffix != ".json":
                continue
            try:
                found[entry] = path_of(read_sealed(entry)["path"])
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise UserError(f"{entry} is damaged ({error!s:.80}); remove it: it only says where a model is") from None
        return found

    def _object(self, key: str, fill: Any) -> Path:
        target = self._objects / key
        if not is_whole(target):
            try:
                with new_directory(target, shared=True) as directory:
                    fill(directory / "weights")
            except (OSError, UserError):
                if not is_whole(target):  # else another process has put it there meanwhile
                    raise
        return target / "weights"


def anchor_key(tensors: Entries) -> str:
    return _key("anchor", tensors)


def expert_key(tensors: Entries) -> str:
    return _key("expert", tensors)


def keys_of(artifact: Artifact) -> list[str]:
    """The objects that a merged model is made of."""
    description = artifact.description
    if artifact.kind != "model" or "anchor" not in description:
        return []
    return [anchor_key(description["anchor"]), *(expert_key(member["tensors"]) for member in description["members"])]


def compose(
    directory: Path,
    target: Mapping[str, Layout],
    trunk: Path,
    experts: Sequence[Source],
    ways: Sequence[str] = WAYS,
    instead: Mapping[str, np.ndarray] | None = None,
) -> dict[str, int]:
    """Writes weights whose trunk and whose experts, in this order, lie elsewhere; returns how many files came which way.

    The ways "link", "reflink" and "copy" move whole files; "stream" goes through memory, a shard at a time, and is also taken where the
    source has another layout, or only one of both places is in a bucket. `instead` has arrays that are written in the place of what lies
    there. A router bias that a source has not is 0. Raises UserError for data that cannot be read, and for a way that a bucket has not.
    """
    if in_bucket(directory) and not {"copy", "stream"} & set(ways):
        raise UserError(f"{directory} is in a bucket, which has no {' and no '.join(ways)}; try --by auto")
    taken: Counter[str] = Counter()
    readers = {weights: Reader(weights) for weights in (trunk, *(source.weights for source in experts))}
    same: dict[tuple[Path, str], bool] = {}
    copies: list[tuple[Path, Path]] = []  # within buckets: many at once

    def put(writer: Writer, path: str, index: Index, weights: Path, at: Index) -> None:
        reader, layout = readers[weights], target[path]
        if (weights, path) not in same:
            ours, theirs = json.loads(canonical_json(layout.metadata())), reader.metadata(path)
            same[weights, path] = _but_shape(theirs) == _but_shape(ours) and in_bucket(weights) == in_bucket(directory)
        if same[weights, path] and "stream" not in ways:
            source, file = reader.file(path, at), writer.file(path, index)
            if in_bucket(directory):
                copies.append((source, file))
                taken["server-side copy"] += 1
            else:
                taken[place(source, file, ways)] += 1
        else:
            box = list(layout.box(index))
            if at != index:  # another expert: there may be more of them there than here
                box[1] = slice(at[1], at[1] + 1)
            writer.write(path, index, reader.read(path, tuple(box)))
            taken["stream"] += 1

    with Writer(directory, target) as writer:
        for path, layout in target.items():
            for index in layout.indices():
                if instead and path in instead:
                    writer.write(path, index, instead[path][layout.box(index)])
                    continue
                if not path.startswith("experts/"):
                    put(writer, path, index, trunk, index)
                    continue
                layer, expert, *rest = index
                source = experts[expert]
                if readers[source.weights].has(path):
                    put(writer, path, index, source.weights, (layer, source.index, *rest))
                else:
                    writer.write(path, index, np.zeros(layout.shard, layout.dtype))
        copy_objects(copies)
    return dict(taken)


def _check_object(path: Path) -> None:
    weights = path / "weights"
    reader = Reader(weights)
    try:
        arrays = (name.removesuffix("/zarr.json").replace(".", "/") for name in listing(weights) if name.endswith("/zarr.json"))
        target = {path: Layout.stored(reader, path) for path in arrays}
        small = metadata_files(target)
        shards = {shard_name(path, index) for path, layout in target.items() for index in layout.indices()}
        found = listing(weights).keys()
        if found != shards | small.keys() or any((weights / name).read_bytes() != content for name, content in small.items()):
            raise UserError("its files are not those of an object")
        entries = _entries(reader, target)
        if path.name not in (anchor_key(entries), expert_key(entries)):
            raise UserError("its bytes are not those that it is named by")
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error!s:.200}; remove it, and merge again to take its contribution in anew") from None


def _entries(reader: Reader, target: Mapping[str, Layout]) -> dict[str, dict[str, Any]]:
    """What an anchor's description or a contribution's manifest says of the tensors of an object."""

    def entry(layout: Layout, shape: Sequence[int], boxes: Iterable[Box], path: str) -> dict[str, Any]:
        return {"dtype": layout.dtype, "shape": list(shape), "sha256": reader.digest(path, boxes)}

    if any(path.startswith("trunk/") for path in target):
        return {path: entry(layout, layout.shape, layout.boxes(), path) for path, layout in target.items()}
    return {
        name_of_tensor(path, layer): entry(layout, layout.shape[2:], layout.boxes(layer=layer), path)
        for path, layout in target.items()
        for layer in range(layout.shape[0])
    }


def _ingest(contribution: Contribution, directory: Path) -> None:
    manifest = contribution.manifest
    config = ModelConfig(**manifest["model"] | {"n_experts": 2, "router_bias": contribution.has_bias})
    L, D, F = config.n_layers, config.d_model, config.d_ffn
    shapes: dict[str, tuple[int, ...]] = {"gate": (L, 1, D, F), "up": (L, 1, D, F), "down": (L, 1, F, D), "row": (L, 1, D)}
    if contribution.has_bias:
        shapes["bias"] = (L, 1)
    entries = {f"experts/{name}": {"shape": shape, "dtype": manifest["dtype"]} for name, shape in shapes.items()}
    small = {path: np.empty(e["shape"], e["dtype"]) for path, e in entries.items() if path.removeprefix("experts/") not in MATRICES}
    largest = D * F * np.dtype(manifest["dtype"]).itemsize
    buffers = itertools.cycle([np.empty(largest, np.uint8) for _ in range(2)])  # one is written while the next is read

    def into(name: str) -> np.ndarray | None:
        return None if leaf_of(name)[0] in small else next(buffers)

    with Writer(directory, layouts(config, entries)) as writer:
        for name, tensor in contribution.tensors(into):
            path, layer = leaf_of(name)
            if path in small:
                small[path][layer, 0] = tensor
            else:
                writer.write_slice(path, (layer, 0), tensor)
        for path, values in small.items():
            writer.write(path, (0,) * values.ndim, values)


def _key(kind: str, tensors: Entries) -> str:
    return hashlib.sha256(canonical_json({"kind": kind, "layout": LAYOUT, "tensors": tensors}).encode()).hexdigest()


def _but_shape(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What two arrays must share for the files of one to be files of the other."""
    kept = ("chunk_grid", "chunk_key_encoding", "codecs", "data_type", "fill_value")
    return {key: metadata.get(key) for key in kept}
