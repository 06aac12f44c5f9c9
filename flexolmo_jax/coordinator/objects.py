"""One object of a store: an anchor, or one expert. What its record says, how it is taken in, and a
check of all its bytes."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
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
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.outputs import UNFINISHED
from flexolmo_jax.storage.paths import File, in_bucket, listing
from flexolmo_jax.storage.untrusted import conform, read_bytes
from flexolmo_jax.storage.weights import Layout, Reader, Writer, metadata_files, shard_name

from .compose import Source, compose
from .sketch import decoded, encoded, sketch_of

OBJECT_FILE = "object.json"
_TEMPORARY_RECORD = re.compile(re.escape(f".{OBJECT_FILE}.") + r"\d+\.tmp")
LAYOUT = 3  # counted up whenever weights.py lays out the same tensors otherwise


def key_of(kind: str, tensors: Mapping[str, Any]) -> str:
    """What an object of these tensors is named."""
    return hashlib.sha256(
        canonical_json({"kind": kind, "layout": LAYOUT, "tensors": tensors}).encode()
    ).hexdigest()


@dataclass(frozen=True)
class Record:
    """`object.json`. `files`: of each file its size and, on a disk, inode and time of change in ns;
    in a bucket its MD5."""

    kind: Literal["anchor", "expert"]
    model: dict[str, Any]
    tensors: DigestedTensors
    sketch: Sketch
    files: dict[Text, tuple[int | str, ...]] = dataclasses.field(default_factory=dict)
    sha256: str = ""

    @classmethod
    def read(cls, directory: Path) -> "Record":
        """Raises UserError where it is missing or damaged."""
        try:
            fields = read_sealed(directory / OBJECT_FILE)
            conform(cls, fields)
            record = cls(**fields)
            build(ModelConfig, record.model).check()
            record.sketches  # noqa: B018  # raises where it is none
        except (OSError, ValueError, UserError) as error:
            raise UserError(
                f"{directory / OBJECT_FILE} is damaged ({error!s:.120}); remove {directory}, and"
                " merge again"
            ) from None
        return record

    def write(self, directory: Path) -> None:
        """Into the directory of the object."""
        fields = dataclasses.asdict(self)
        write_text(
            directory / OBJECT_FILE,
            sealed_json({key: value for key, value in fields.items() if key != "sha256"}),
        )

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
        """Whether the object's files are those that were written, as far as sizes and times
        tell."""
        return {name: list(values) for name, values in self.files.items()} == _files_in(directory)

    def of_files_in(self, directory: Path) -> "Record":
        return dataclasses.replace(
            self, files={name: tuple(values) for name, values in _files_in(directory).items()}
        )

    def layouts(self) -> dict[str, Layout]:
        if self.kind == "anchor":
            return layouts(self.config, self.entries)
        return expert_layouts(
            self.config,
            next(iter(self.entries.values()))["dtype"],
            name_of_tensor("bias", 0) in self.tensors,
        )


def content_of(directory: Path) -> dict[str, File]:
    """The files of an object, but its record, and what another process is writing of that, or was
    killed while it did."""
    return {
        name: file
        for name, file in listing(directory).items()
        if name not in (OBJECT_FILE, UNFINISHED) and not _TEMPORARY_RECORD.fullmatch(name)
    }


def _files_in(directory: Path) -> dict[str, list[int | str]]:
    found = content_of(directory)
    if in_bucket(directory):
        return {name: [file.size, file.md5] for name, file in found.items()}
    status = {name: (directory / name).lstat() for name in found}
    return {name: [each.st_size, each.st_ino, each.st_mtime_ns] for name, each in status.items()}


def expert_layouts(config: ModelConfig, dtype: str, has_bias: bool) -> dict[str, Layout]:
    """Of one expert alone, as a model's arrays with that expert."""
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
    return layouts(
        config,
        {f"experts/{name}": {"shape": shape, "dtype": dtype} for name, shape in shapes.items()},
    )


def take_anchor(anchor: Artifact, directory: Path) -> Record:
    """Copies a verified anchor's weights: its own files may be changed by whoever has them."""
    tensors, source = anchor.description["tensors"], anchor.path / "weights"
    compose(
        directory / "weights",
        layouts(anchor.config, tensors),
        source,
        [Source(source, 0)],
        ("reflink", "copy"),
    )
    sketches = sketches_of(directory / "weights", anchor.config)
    return Record("anchor", to_dict(anchor.config), tensors, encoded(sketches)).of_files_in(
        directory
    )


def sketches_of(weights: Path, config: ModelConfig, expert: int = 0) -> np.ndarray:
    """Sketches of an expert in a directory of weights, float64 [3 L, buckets]. Reads a matrix at a
    time."""
    reader = Reader(weights)
    return np.stack(
        [
            sketch_of(
                reader.read(
                    f"experts/{leaf}", (slice(layer, layer + 1), slice(expert, expert + 1))
                )[0, 0],
                leaf,
            )
            for layer in range(config.n_layers)
            for leaf in MATRICES
        ]
    )


def sketch_claim(model: Artifact) -> str:
    """What is remembered of a model whose sketches are those of its weights."""
    return f"sketches {model.description['sha256']}"


def take_expert(contribution: Contribution, directory: Path) -> Record:
    """Reads, checks and lays out a contribution, one tensor at a time."""
    manifest = contribution.manifest
    config = build(ModelConfig, manifest["model"])
    target = expert_layouts(config, manifest["dtype"], contribution.has_bias)
    small = {
        path: np.empty(layout.shape, layout.dtype)
        for path, layout in target.items()
        if path.removeprefix("experts/") not in MATRICES
    }
    largest = config.d_model * config.d_ffn * np.dtype(manifest["dtype"]).itemsize
    # one is written while the next is read
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
    in_order = np.stack(
        [sketches[layer, leaf] for layer in range(config.n_layers) for leaf in MATRICES]
    )
    return Record("expert", manifest["model"], manifest["tensors"], encoded(in_order)).of_files_in(
        directory
    )


def check_object(path: Path) -> None:
    """Reads all of an object. Raises UserError where its files or their bytes are not those that
    its name and its record say."""
    record = Record.read(path)
    try:
        if record.key != path.name:
            raise UserError("it is not what it is named by")
        target, found = record.layouts(), content_of(path)
        small = {f"weights/{name}": content for name, content in metadata_files(target).items()}
        sizes = {
            f"weights/{shard_name(at, index)}": layout.shard_bytes
            for at, layout in target.items()
            for index in layout.indices()
        }
        sizes |= {name: len(content) for name, content in small.items()}
        if found.keys() != sizes.keys() or any(
            found[name].size != size for name, size in sizes.items()
        ):
            raise UserError("its files are not those of an object")
        if any(read_bytes(path / name, len(content)) != content for name, content in small.items()):
            raise UserError("its metadata is not that of its tensors")
        _check_tensors(record, target, Reader(path / "weights"))
    except (UserError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: {error!s:.200}; remove it, and merge again to take its"
            " contribution in anew"
        ) from None


def _check_tensors(record: Record, target: Mapping[str, Layout], reader: Reader) -> None:
    for name, entry in record.entries.items():
        path, boxes = (
            (name, list(target[name].boxes()))
            if record.kind == "anchor"
            else _expert_boxes(name, target)
        )
        if reader.digest(path, boxes) != entry["sha256"]:
            raise UserError(f"the bytes of {name} are not those of its record")


def _expert_boxes(
    name: str, target: Mapping[str, Layout]
) -> tuple[str, Sequence[tuple[slice, ...]]]:
    path, layer = leaf_of(name)
    return path, list(target[path].boxes(layer=layer))
