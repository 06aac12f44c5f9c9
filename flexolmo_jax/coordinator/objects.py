"""An object of a store, an anchor or an expert: its inventory, taking it in, checking its bytes."""

import contextlib
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from flexolmo_jax.artifact import Artifact, read_sealed, sealed_json
from flexolmo_jax.config import ModelConfig, build, to_dict
from flexolmo_jax.description import DigestedTensors, Sketch, Text, canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import Contribution
from flexolmo_jax.integrity import MATRICES, layouts, leaf_of, name_of_tensor
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.outputs import UNFINISHED
from flexolmo_jax.storage.paths import File, in_bucket, listing
from flexolmo_jax.storage.tensorfile import finite
from flexolmo_jax.storage.untrusted import conform, read_bytes
from flexolmo_jax.storage.weights import Layout, Reader, Writer, metadata_files, shard_name

from .materialize import StoredExpert, materialize
from .sketch import agree, decoded, encoded, sketch_of

OBJECT_FILE = "object.json"
_TEMPORARY_INVENTORY = re.compile(re.escape(f".{OBJECT_FILE}.") + r"\d+\.tmp")
LAYOUT = 3  # goes up whenever storage/weights.py changes the files of the same tensors


def key_of(kind: str, tensors: Mapping[str, Any]) -> str:
    """The name of an object with these tensors: a SHA-256."""
    content = canonical_json({"kind": kind, "layout": LAYOUT, "tensors": tensors})
    return hashlib.sha256(content.encode()).hexdigest()


def anchor_key(tensors: Mapping[str, Any]) -> str:
    return key_of("anchor", tensors)


def expert_key(tensors: Mapping[str, Any]) -> str:
    return key_of("expert", tensors)


@dataclass(frozen=True)
class Inventory:
    """What `object.json` says of an object."""

    kind: Literal["anchor", "expert"]
    model: dict[str, Any]
    tensors: DigestedTensors
    sketch: Sketch
    # by file: size, and on a disk inode and time of change in ns, in a bucket the MD5
    files: dict[Text, tuple[int | str, ...]] = dataclasses.field(default_factory=dict)
    sha256: str = ""

    @classmethod
    def read(cls, directory: Path) -> "Inventory":
        """The inventory of the object in a directory.

        Raises UserError where it is missing or damaged.
        """
        try:
            fields = read_sealed(directory / OBJECT_FILE)
            conform(cls, fields)
            inventory = cls(**fields)
            build(ModelConfig, inventory.model).check()
            inventory.sketches  # noqa: B018  # raises ValueError where the sketch is damaged
        except (OSError, ValueError, UserError) as error:
            raise UserError(
                f"{directory / OBJECT_FILE} is damaged ({error!s:.120}); remove {directory}, and"
                " merge again"
            ) from None
        return inventory

    def write(self, directory: Path) -> None:
        """Writes the inventory into the object's directory."""
        write_text(directory / OBJECT_FILE, sealed_json(dataclasses.asdict(self)))

    @property
    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """`tensors` as JSON gave it: dtype, shape and SHA-256 by name."""
        return cast(Any, self.tensors)

    @property
    def key(self) -> str:
        return key_of(self.kind, self.entries)

    @property
    def config(self) -> ModelConfig:
        return build(ModelConfig, self.model)

    @property
    def sketches(self) -> np.ndarray:
        """float64 [3 L, buckets]: gate, up and down of each layer in turn."""
        return decoded(self.sketch, self.config)

    def matches(self, directory: Path) -> bool:
        """Whether the object's files are the written ones, as far as sizes and times tell."""
        return {name: list(values) for name, values in self.files.items()} == _files_in(directory)

    def of_files_in(self, directory: Path) -> "Inventory":
        """The inventory with the sizes and times of the files that are in the directory now."""
        files = {name: tuple(values) for name, values in _files_in(directory).items()}
        return dataclasses.replace(self, files=files)

    def statement(self, directory: Path) -> str:
        """What is vouched for (storage/verified.py): these files hold what the inventory says."""
        where = str(directory) if in_bucket(directory) else directory.stat().st_dev
        fields = dataclasses.asdict(self) | {"sha256": ""}
        return canonical_json({"object": fields, "where": where})

    def layouts(self) -> dict[str, Layout]:
        """The layout of each of the object's arrays."""
        if self.kind == "anchor":
            return layouts(self.config, self.entries)
        dtype = next(iter(self.entries.values()))["dtype"]
        return expert_layouts(self.config, dtype, name_of_tensor("bias", 0) in self.tensors)


def content_of(directory: Path, *, clutter: bool = False) -> dict[str, File]:
    """The files of an object, as `listing` has them, without its inventory, or what a process is
    writing of that."""
    return {
        name: file
        for name, file in listing(directory, clutter=clutter).items()
        if name not in (OBJECT_FILE, UNFINISHED) and not _TEMPORARY_INVENTORY.fullmatch(name)
    }


def _files_in(directory: Path) -> dict[str, list[int | str]]:
    found = content_of(directory)
    if in_bucket(directory):
        return {name: [file.size, file.md5] for name, file in found.items()}
    status = {name: (directory / name).lstat() for name in found}
    return {name: [each.st_size, each.st_ino, each.st_mtime_ns] for name, each in status.items()}


def expert_layouts(config: ModelConfig, dtype: str, has_bias: bool) -> dict[str, Layout]:
    """The layouts of a single expert's arrays, [L, 1, ...]."""
    L, D, F = config.n_layers, config.d_model, config.d_ffn
    shapes: dict[str, tuple[int, ...]] = {
        "gate": (L, 1, D, F),
        "up": (L, 1, D, F),
        "down": (L, 1, F, D),
        "row": (L, 1, D),
    }
    if has_bias:
        shapes["bias"] = (L, 1)
    config = dataclasses.replace(config, n_experts=2, router_bias=has_bias)
    tensors = {f"experts/{leaf}": {"shape": s, "dtype": dtype} for leaf, s in shapes.items()}
    return layouts(config, tensors)


def take_anchor(anchor: Artifact, directory: Path) -> Inventory:
    """Copies a verified anchor's weights into the directory of an object.

    The files are not linked: whoever has the anchor may change its own. Raises UserError for
    weights that are not finite, which earlier versions published.
    """
    config, tensors = anchor.config, anchor.description["tensors"]
    published, own = anchor.path / "weights", directory / "weights"
    experts, ways = [StoredExpert(published, 0)], ("reflink", "copy")
    target, reader = layouts(config, tensors), Reader(own)
    materialize(own, target, published, experts, ways)
    for path, layout in target.items():
        for box in layout.boxes():
            finite(reader.read(path, box), f"{path} of {anchor.path}")
    sketch = encoded(sketches_of(own, config))
    return Inventory("anchor", to_dict(config), tensors, sketch).of_files_in(directory)


def sketches_of(weights: Path, config: ModelConfig, expert: int = 0) -> np.ndarray:
    """Sketches of an expert in a directory of weights, float64 [3 L, buckets].

    One matrix at a time is in memory.
    """
    reader, sketches = Reader(weights), []
    for layer in range(config.n_layers):
        box = slice(layer, layer + 1), slice(expert, expert + 1)
        for leaf in MATRICES:
            sketches.append(sketch_of(reader.read(f"experts/{leaf}", box)[0, 0], leaf))
    return np.stack(sketches)


def sketch_claim(model: Artifact) -> str:
    """The claim, for storage/verified.py, that a model's sketches are those of its weights."""
    return f"sketches {model.description['sha256']}"


def take_expert(contribution: Contribution, directory: Path) -> Inventory:
    """Reads and checks a contribution and writes its weights, one tensor at a time."""
    manifest = contribution.manifest
    config = build(ModelConfig, manifest["model"])
    target = expert_layouts(config, manifest["dtype"], contribution.has_bias)
    small = {
        path: np.empty(layout.shape, layout.dtype)
        for path, layout in target.items()
        if path.removeprefix("experts/") not in MATRICES
    }
    largest = config.d_model * config.d_ffn * np.dtype(manifest["dtype"]).itemsize
    # two: one is written while the next is read
    buffers = itertools.cycle([np.empty(largest, np.uint8) for _ in range(2)])
    sketches: dict[tuple[int, str], np.ndarray] = {}

    def into(name: str) -> np.ndarray | None:
        return None if leaf_of(name)[0] in small else next(buffers)

    with Writer(directory / "weights", target) as writer:
        for name, tensor in contribution.tensors(into):
            path, layer = leaf_of(name)
            if path in small:
                small[path][layer, 0] = tensor
            else:
                writer.write_slice(path, (layer, 0), tensor)
                leaf = path.removeprefix("experts/")
                sketches[layer, leaf] = sketch_of(tensor, leaf)
        for path, values in small.items():
            writer.write(path, (0,) * values.ndim, values)
    layers = range(config.n_layers)
    sketch = encoded(np.stack([sketches[layer, leaf] for layer in layers for leaf in MATRICES]))
    inventory = Inventory("expert", manifest["model"], manifest["tensors"], sketch)
    return inventory.of_files_in(directory)


def checked(path: Path) -> Inventory:
    """The inventory of an object that this user has checked, and whose files are those of it since.

    Anybody may have written the inventory. The object is read where nobody vouches for it.

    Raises UserError as `check_object` does.
    """
    inventory = Inventory.read(path)
    is_known = inventory.key == path.name and verified.is_vouched(inventory.statement(path))
    if is_known and inventory.matches(path):
        return inventory
    note(f"{path} was copied or changed, or another user took it in; it is read again")
    inventory = inventory.of_files_in(path)
    check_object(path)
    if not inventory.matches(path):
        raise UserError(
            f"{path} changed while it was read; stop all writing there and run it again"
        )
    with contextlib.suppress(OSError):
        inventory.write(path)
    verified.vouch(inventory.statement(path))
    return inventory


def check_object(path: Path) -> None:
    """Reads all of an object's bytes.

    Raises UserError where its files or their bytes are not those of its name and its inventory.
    """
    inventory = Inventory.read(path)
    try:
        if inventory.key != path.name:
            raise UserError("its inventory is that of another object")
        target = inventory.layouts()
        _check_files(path, target)
        _check_tensors(inventory, target, Reader(path / "weights"))
        if not agree(inventory.sketches, sketches_of(path / "weights", inventory.config)):
            raise UserError("the sketch in its inventory is not that of its weights")
    except (UserError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: {error!s:.200}; remove it, and merge again to take its"
            " contribution in anew"
        ) from None


def _check_files(path: Path, target: Mapping[str, Layout]) -> None:
    found = {name: file.size for name, file in content_of(path).items()}
    metadata = {f"weights/{name}": content for name, content in metadata_files(target).items()}
    sizes = {
        f"weights/{shard_name(array, index)}": layout.shard_bytes
        for array, layout in target.items()
        for index in layout.indices()
    }
    if found != sizes | {name: len(content) for name, content in metadata.items()}:
        raise UserError("its files are not those of an object")
    for name, content in metadata.items():
        if read_bytes(path / name, len(content)) != content:
            raise UserError("its metadata is not that of its tensors")


def _check_tensors(inventory: Inventory, target: Mapping[str, Layout], reader: Reader) -> None:
    for name, entry in inventory.entries.items():
        if inventory.kind == "anchor":
            path, boxes = name, target[name].boxes()
        else:
            path, layer = leaf_of(name)
            boxes = target[path].boxes(layer=layer)
        if reader.digest(path, list(boxes)) != entry["sha256"]:
            raise UserError(f"the bytes of {name} are not those of its inventory")
