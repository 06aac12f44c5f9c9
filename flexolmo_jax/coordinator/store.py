"""The store: every anchor and expert that was taken in, once, verified on the way in and never
changed after.

    STORE/store.json                  which store this is; only this program writes it
    STORE/objects/<key>/object.json   what an object holds: its files, their sizes and times
    STORE/objects/<key>/weights/      an anchor's, or those of a model of one expert (weights.py)
    STORE/models/<digest>.json        where the models are that were composed of objects

An object is named by what it holds. Models are composed of its files (compose.py). A model stands
on its own: removing the store, or an object that `gc` finds no model to need, changes none. Before
an object is used its files are compared with its record; whatever differs is read again, whole.
Nothing is removed but objects whose files are exactly those of their record, and what bears the
mark of files.py.

In a bucket the same files come by copies that the object store makes itself. It has no locks: there
`gc` leaves alone what changed within the last hour, and should not run while somebody merges.
"""

import contextlib
import hashlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
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
from flexolmo_jax.storage.paths import absolute, children, in_bucket, listing, path_of

from .objects import Record, check_object, content_of, key_of, take_anchor, take_expert

STORE = "flexolmo-store"
FORMAT = 1
# what a killed `write_text` leaves
_TEMPORARY_ENTRY = re.compile(r"\.[0-9a-f]{16}\.json\.\d+\.tmp")


class Held(NamedTuple):
    """An object as it is used."""

    weights: Path
    sketch: np.ndarray  # float64 [matrices, buckets], see sketch.py


@dataclass(frozen=True)
class Store:
    """A directory. `shared` and `alone` hold its lock: composing needs objects to stay, `gc` needs
    nobody to compose."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> "Store":
        """A store, or a place for a new one. Raises UserError for a directory that holds anything
        else."""
        store = cls(absolute(path))
        if not store._is_known() and children(store.path):
            raise UserError(
                f"{path} is not a store of this version: it has no {STORE_FILE}; give --store a new"
                " or empty directory, or the store itself"
            )
        return store

    @classmethod
    def existing(cls, path: Path) -> "Store":
        """Raises UserError where there is none."""
        store = cls(absolute(path))
        if not store._is_known():
            if not path.exists():
                raise UserError(f"{path} does not exist; expected a store (flexolmo-store)")
            raise UserError(
                f"{path} is not a store: it has no {STORE_FILE}; expected what `flexolmo merge`"
                " made (flexolmo-store)"
            )
        return store

    @property
    def _objects(self) -> Path:
        return self.path / "objects"

    @property
    def _models(self) -> Path:
        return self.path / "models"

    def _is_known(self) -> bool:
        """Whether this is a store. Raises UserError for one of another version, and for a damaged
        one."""
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
            # A link may lead to what another store holds, a pipe would wait for ever.
            if folder.is_symlink() or not folder.is_dir():
                raise UserError(
                    f"{folder} is not a directory; expected the store's own, and no link;"
                    " restore it, or give another --store"
                )
        return True

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Makes the store where there is none. One that was made for nothing goes with the error,
        unless somebody else uses it by then."""
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
            write_text(
                directory / STORE_FILE,
                sealed_json({"kind": "store", "format": FORMAT, "id": uuid.uuid4().hex}),
            )

    def _unmake(self) -> None:
        """Takes away what was begun here, but nothing that a model is made of, and nothing of
        anybody else's."""
        for entry, model in self._registered().items():
            if not model.exists():
                remove_file(entry)
        for path in self._unneeded():
            if self._is_ours(path):
                discard(path)
        if children(self._objects) or children(self._models):
            return
        remove_file(self.path / STORE_FILE)
        for directory in (self._objects, self._models, self.path):
            remove_if_empty(directory)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with locked(self._objects):
            yield

    def anchor(self, anchor: Artifact) -> Held:
        """A published anchor, taken in if it is not here yet. Raises UserError for bytes that are
        not the published ones."""
        anchor.ensure()
        return self._object(
            anchor_key(anchor.description["tensors"]),
            lambda directory: take_anchor(anchor, directory),
        )

    def expert(self, contribution: Contribution) -> Held:
        """A contribution, taken in if it is not here yet. Raises UserError as
        `Contribution.tensors` does."""
        key, claim = (
            expert_key(contribution.manifest["tensors"]),
            f"contribution {contribution.manifest['sha256']}",
        )
        if not is_whole(self._objects / key):
            held = self._object(key, lambda directory: take_expert(contribution, directory))
            verified.remember(contribution.path, claim)
            return held
        # What is here may be whole while what is given is damaged.
        verified.once(contribution.path, claim, contribution.check_tensors)
        return self._checked(key)

    def held(self, key: str, what: str) -> Held:
        """An object that was taken in earlier. Raises UserError where it is not here (any more)."""
        if not self.holds(key):
            raise UserError(
                f"the store {self.path} does not hold {what}; give the one that the model was"
                " merged with (--store), or merge again"
            )
        return self._checked(key)

    def register(self, model: Path) -> None:
        """Remembers where a model is about to be. Raises UserError for one inside the store, and
        for one around it."""
        model = absolute(model)
        if model == self.path or model in self.path.parents or self.path in model.parents:
            raise UserError(
                f"{model} and the store {self.path} lie in each other; give --out or"
                " --store another place"
            )
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
        return self._is_known() and is_whole(self._objects / key)

    def verify(self) -> int:
        """Reads every object; returns how many. Raises UserError naming the first that is not what
        its name says. Writes nothing."""
        self._registered()
        with (
            contextlib.nullcontext() if in_bucket(self.path) else locked(self._objects, shared=True)
        ):
            objects = self._whole()
            for path in objects:
                check_object(path)
        return len(objects)

    def info(self) -> dict[str, Any]:
        """What is here: objects, their bytes, and the models that are made of them."""
        objects = self._whole()
        size = sum(file.size for path in objects for file in listing(path).values())
        models = {str(model.path): list(model.experts) for model in self.models()}
        return {"kind": "store", "objects": len(objects), "bytes": size, "models": models}

    def gc(self) -> dict[str, Any]:
        """Removes objects that no registered model is made of, and what killed processes left, here
        and beside those models.

        An object that holds anything but the files of its record is left alone, and named.
        So are models that are not where they were composed: whoever moved one sees that the store
        has lost it.
        """
        with self.alone():
            unneeded = [path for path in self._unneeded() if is_settled(path)]
            removed = [path for path in unneeded if self._is_ours(path)]
            size = sum(file.size for path in removed for file in listing(path).values())
            left = set(abandoned(self._objects))
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
        told = {
            "store": str(self.path),
            "removed": [p.name for p in removed],
            "leftovers": len(left),
            "bytes": size,
            "kept": kept,
        }
        told |= {"no_longer_there": sorted(forgotten)} if forgotten else {}
        return told | ({"left_alone": foreign} if foreign else {})

    def _unneeded(self) -> list[Path]:
        """Objects that no model is made of. Raises UserError where a model is there that does not
        tell what it is made of."""
        needed: set[str] = set()
        for model in self._registered().values():
            try:
                if (model / DESCRIPTION).exists():
                    needed |= set(keys_of(open_artifact(model)))
            except UserError as error:
                raise UserError(
                    f"{error}; until then nothing is removed from {self.path}, which may hold"
                    " its parts"
                ) from None
        return [path for path in self._whole() if path.name not in needed]

    def _is_ours(self, path: Path) -> bool:
        try:
            return content_of(path).keys() == Record.read(path).files.keys()
        except UserError:
            return False

    def _whole(self) -> list[Path]:
        """The objects that are there, and not what somebody is writing."""
        return [
            path
            for path in children(self._objects)
            if not path.name.startswith(".") and is_whole(path)
        ]

    def _registered(self) -> dict[Path, Path]:
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

    def _object(self, key: str, take: Callable[[Path], Record]) -> Held:
        target = self._objects / key
        if not is_whole(target):
            try:
                with new_directory(target, shared=True) as directory:
                    take(directory).write(directory)
            except (OSError, UserError):
                if not is_whole(target):  # else another process has put it there meanwhile
                    raise
        return self._checked(key)

    def _checked(self, key: str) -> Held:
        """An object whose files are those of its record; if they are not, whose bytes are still
        what its name says."""
        path = self._objects / key
        record = Record.read(path)
        if record.key != key or not record.matches(path):
            note(f"{path} was copied or changed since it was taken in; it is read again")
            check_object(path)
            with contextlib.suppress(OSError):
                record.of_files_in(path).write(path)
        return Held(path / "weights", record.sketches)


def keys_of(artifact: Artifact) -> list[str]:
    """The objects that a merged model is made of."""
    description = artifact.description
    if artifact.kind != "model" or "anchor" not in description:
        return []
    return [
        anchor_key(anchor_tensors(description)),
        *(expert_key(tensors_of(member)) for member in description["members"]),
    ]


def anchor_key(tensors: Mapping[str, Any]) -> str:
    return key_of("anchor", tensors)


def expert_key(tensors: Mapping[str, Any]) -> str:
    return key_of("expert", tensors)
