"""The store: every anchor and expert that was taken in, once, verified and never changed after.

    STORE/store.json                  marks the store, with its id
    STORE/objects/<key>/object.json   what an object holds: its files, their sizes and times
    STORE/objects/<key>/weights/      an anchor's weights, or those of one expert
    STORE/models/<digest>.json        where a model is that was composed of objects

An object's name is a digest of its tensors. Models are composed of the objects' files
(materialize.py). A model is complete in itself: it stays the same if the store is removed. Before
an object is used, its files are compared with its inventory. If they differ, or this user has not
checked the object yet, all its bytes are read and checked. `gc` only removes objects whose files
are those of their inventory, and what a killed process left, which storage/files.py marks.

In a bucket, the object store copies the files itself. A bucket has no locks. So `gc` keeps what
changed there within the last hour, and should not run during a merge.
"""

import contextlib
import hashlib
import re
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.artifact import DESCRIPTION, Artifact, open_artifact, read_sealed, sealed_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import Contribution
from flexolmo_jax.integrity import anchor_tensors, tensors_of
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.files import (
    abandoned,
    clear,
    discard,
    is_settled,
    new_directory,
    remove_abandoned,
    remove_file,
    remove_if_empty,
    write_text,
)
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.storage.outputs import STORE_FILE, is_whole
from flexolmo_jax.storage.paths import (
    absolute,
    check_for_arrays,
    children,
    in_bucket,
    listing,
    path_of,
    takes_paths,
)

from .objects import (
    Inventory,
    anchor_key,
    check_object,
    checked,
    content_of,
    expert_key,
    take_anchor,
    take_expert,
)

STORE = "flexolmo-store"
FORMAT = 1
# a file that a killed `write_text` left
_TEMPORARY_ENTRY = re.compile(r"\.[0-9a-f]{16}\.json\.\d+\.tmp")


class Held(NamedTuple):
    """An object that was checked: its weights and its sketches."""

    weights: Path
    sketches: np.ndarray  # float64 [matrices, buckets], see sketch.py


@dataclass(frozen=True)
class Store:
    """A store's directory and its lock, `shared` by those who compose, taken by `gc` `alone`."""

    path: Path

    @classmethod
    @takes_paths
    def at(cls, path: Path) -> "Store":
        """A store, or a place for a new one. Raises UserError for anything else."""
        store = cls(absolute(path))
        check_for_arrays(store.path)
        if not store._is_known() and children(store.path, clutter=True):
            raise UserError(
                f"{path} is not a store of this version: it has no {STORE_FILE}; give --store a new"
                " or empty directory, or the store itself"
            )
        return store

    @classmethod
    @takes_paths
    def existing(cls, path: Path) -> "Store":
        """The store in a directory. Raises UserError where there is none."""
        store = cls(absolute(path))
        if not store._is_known():
            why = f"is not a store: it has no {STORE_FILE}" if path.exists() else "does not exist"
            raise UserError(
                f"{path} {why}; expected a store, as `flexolmo merge` makes it (flexolmo-store)"
            )
        return store

    @property
    def _objects(self) -> Path:
        return self.path / "objects"

    @property
    def _models(self) -> Path:
        return self.path / "models"

    def _is_known(self) -> bool:
        """Whether a store is here. Raises UserError for a damaged one or one of another version."""
        try:
            said = read_sealed(self.path / STORE_FILE)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path / STORE_FILE} is damaged ({error!s:.80}); restore it, or give another"
                " --store"
            ) from None
        if said.get("kind") != "store" or said.get("format") != FORMAT:
            raise UserError(
                f"{self.path} has the format {said.get('format')!r:.20}; this version reads"
                f" {FORMAT}; give another --store"
            )
        for folder in () if in_bucket(self.path) else (self._objects, self._models):
            # A link may lead into another store, and opening a pipe would wait for ever.
            if folder.is_symlink() or not folder.is_dir():
                raise UserError(
                    f"{folder} is not a directory; expected the store's own, and no link;"
                    " restore it, or give another --store"
                )
        return True

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keeps the store's objects in place, and makes the store where there is none.

        After an error, a store that was made here is removed again, unless another process uses it.
        """
        is_new = not self._is_known()
        if is_new:
            try:
                self._make()
            except UserError:
                if not self._is_known():  # else another process has just made it
                    raise
        if in_bucket(self.path):
            yield
            return
        try:
            with locked(self._objects, shared=True):
                yield
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError, UserError), locked(self._objects, wait=False):
                    self._unmake()
            raise

    def _make(self) -> None:
        clear(self.path)
        with new_directory(self.path) as directory:
            for name in () if in_bucket(directory) else ("objects", "models"):
                (directory / name).mkdir()
            mark = {"kind": "store", "format": FORMAT, "id": uuid.uuid4().hex}
            write_text(directory / STORE_FILE, sealed_json(mark))

    def _unmake(self) -> None:
        """Removes what this process made, but no object that a model needs and no foreign file."""
        for entry, model in self._registered().items():
            if not model.exists():
                remove_file(entry)
        for path in self._unneeded():
            if self._is_ours(path):
                discard(path)
        if any(children(folder, clutter=True) for folder in (self._objects, self._models)):
            return
        remove_file(self.path / STORE_FILE)
        for directory in (self._objects, self._models, self.path):
            remove_if_empty(directory)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps everybody else from composing."""
        with locked(self._objects):
            yield

    def anchor(self, anchor: Artifact) -> Held:
        """The object of a published anchor, which is taken in if it is not here yet.

        Raises UserError for bytes that are not the published ones.
        """
        anchor.ensure()
        key = anchor_key(anchor.description["tensors"])
        return self._object(key, lambda directory: take_anchor(anchor, directory))

    def expert(self, contribution: Contribution) -> Held:
        """The object of a contribution, which is taken in if it is not here yet.

        Raises UserError as `Contribution.tensors` does.
        """
        key = expert_key(contribution.manifest["tensors"])
        claim = f"contribution {contribution.manifest['sha256']}"
        if not is_whole(self._objects / key):
            held = self._object(key, lambda directory: take_expert(contribution, directory))
            verified.remember(contribution.path, claim)
            return held
        # The object is whole, but the contribution's own files may be damaged.
        verified.once(contribution.path, claim, contribution.check_tensors)
        note(f"{contribution.name}: the store holds its weights already, and the model gets those")
        return self._checked(key)

    def held(self, key: str, what: str) -> Held:
        """An object that was taken in earlier. Raises UserError where it is not here."""
        if not self.holds(key):
            raise UserError(
                f"the store {self.path} does not hold {what}; give the one that the model was"
                " merged with (--store), or merge again"
            )
        return self._checked(key)

    def check_again(self, weights: Collection[Path]) -> None:
        """Checks again those of these directories of weights that are objects of this store.

        Raises UserError as `held` does.
        """
        for directory in weights:
            if directory.parent.parent == self._objects:
                self._checked(directory.parent.name)

    def register(self, model: Path) -> None:
        """Notes where a model is about to be written.

        Raises UserError for a model inside the store, and for one around it.
        """
        model = absolute(model)
        check_for_arrays(model)
        if model == self.path or model in self.path.parents or self.path in model.parents:
            raise UserError(
                f"the model {model} and the store {self.path} may not contain each other; give"
                " another --out or --store"
            )
        entry = self._models / f"{hashlib.sha256(str(model).encode()).hexdigest()[:16]}.json"
        write_text(entry, sealed_json({"path": str(model)}))

    def models(self) -> list[Artifact]:
        """The models that are still where they were composed."""
        found = []
        for path in self._registered().values():
            try:
                found.append(open_artifact(path))
            except UserError:
                continue
        return found

    def holds(self, key: str) -> bool:
        """Whether the store has the object of this name, as a whole."""
        return self._is_known() and is_whole(self._objects / key)

    def verify(self) -> int:
        """Reads and checks every object, and returns how many there are. Writes nothing.

        Raises UserError naming the first that is damaged.
        """
        self._registered()
        has_lock = not in_bucket(self.path)
        with locked(self._objects, shared=True) if has_lock else contextlib.nullcontext():
            objects = self._whole()
            for path in objects:
                check_object(path)
        return len(objects)

    def info(self) -> dict[str, Any]:
        """How many objects there are, their bytes, and the models that are made of them."""
        objects = self._whole()
        size = sum(file.size for path in objects for file in listing(path).values())
        models = {str(model.path): list(model.experts) for model in self.models()}
        return {"kind": "store", "objects": len(objects), "bytes": size, "models": models}

    def gc(self) -> dict[str, Any]:
        """Removes the objects that no registered model needs, and what killed processes left.

        The latter also beside the store and the registered models. An object with other files than
        those of its inventory stays and is named. So are models that are no longer where they were
        composed: whoever moved one sees that the store has forgotten it.
        """
        with self.alone():
            unneeded = [path for path in self._unneeded() if is_settled(path)]
            removed = [path for path in unneeded if self._is_ours(path)]
            size = sum(file.size for path in removed for file in listing(path).values())
            left = {*abandoned(self._objects), *abandoned(self.path.parent, self.path.name)}
            forgotten = []
            for entry, model in self._registered().items():
                left |= set(abandoned(model.parent, model.name))
                if not model.exists() or model in left:
                    remove_file(entry)
                    forgotten.append(str(model))
            for path in removed:
                discard(path)
            size += sum(file.size for path in left for file in listing(path).values())
            for path in left:
                remove_abandoned(path)
            for path in children(self._models):
                if _TEMPORARY_ENTRY.fullmatch(path.name):
                    remove_file(path)
            kept = [path.name for path in children(self._objects)]
        foreign = [path.name for path in unneeded if path not in removed]
        return {
            "store": str(self.path),
            "removed": [path.name for path in removed],
            "leftovers": len(left),
            "bytes": size,
            "kept": kept,
            **({"no_longer_there": sorted(forgotten)} if forgotten else {}),
            **({"left_alone": foreign} if foreign else {}),
        }

    def _unneeded(self) -> list[Path]:
        """The objects that no registered model needs.

        Raises UserError for a model whose description cannot be read.
        """
        needed: set[str] = set()
        for model in self._registered().values():
            try:
                if (model / DESCRIPTION).exists():
                    needed |= set(keys_of(open_artifact(model)))
            except UserError as error:
                raise UserError(
                    f"{error}; until then nothing is removed from {self.path}, as the model may"
                    " need it"
                ) from None
        return [path for path in self._whole() if path.name not in needed]

    def _is_ours(self, path: Path) -> bool:
        """Whether an object has no other files than those of its inventory."""
        try:
            return content_of(path, clutter=True).keys() == Inventory.read(path).files.keys()
        except UserError:
            return False

    def _whole(self) -> list[Path]:
        """The objects that are written to the end."""
        found = children(self._objects)
        return [path for path in found if not path.name.startswith(".") and is_whole(path)]

    def _registered(self) -> dict[Path, Path]:
        """Where models were composed, by the file in `models` that says so."""
        found = {}
        for entry in children(self._models):
            if entry.suffix != ".json" or entry.name.startswith("."):
                continue
            try:
                found[entry] = path_of(read_sealed(entry)["path"])
            except (OSError, ValueError, TypeError, KeyError, UserError) as error:
                raise UserError(
                    f"{entry} is damaged ({error!s:.80}); remove it: it only says where a model is"
                ) from None
        return found

    def _object(self, key: str, take: Callable[[Path], Inventory]) -> Held:
        """The object of this name, which `take` writes into a directory if it is not here yet."""
        target = self._objects / key
        if not is_whole(target):
            try:
                with new_directory(target, shared=True) as directory:
                    inventory = take(directory)
                    inventory.write(directory)
                    verified.vouch(inventory.statement(directory))
            except (OSError, UserError):
                if not is_whole(target):  # else another process has just written it
                    raise
        return self._checked(key)

    def _checked(self, key: str) -> Held:
        path = self._objects / key
        return Held(path / "weights", checked(path).sketches)


def keys_of(artifact: Artifact) -> list[str]:
    """The names of the objects that a merged model is made of."""
    description = artifact.description
    if artifact.kind != "model" or "anchor" not in description:
        return []
    return [
        anchor_key(anchor_tensors(description)),
        *(expert_key(tensors_of(member)) for member in description["members"]),
    ]
