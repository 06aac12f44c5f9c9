"""Weights in files, written a shard at a time; Orbax restores them with any sharding.

Each parameter is a Zarr 3 array. A shard is one file and holds one matrix: of one layer and one
expert. So experts are files: adding or removing an expert moves files and leaves their bytes alone.
Chunks inside a shard split the "embed" axis, so that a device which holds a part of that axis reads
only this part. Each chunk has a CRC-32C, so that a flipped bit is an error and not a wrong weight.

    <parameter>/zarr.json                 <parameter> is its path, with dots
    <parameter>/c/<index of the shard>
    _METADATA, _CHECKPOINT_METADATA       Orbax's
    commit_success.txt                    Orbax's, written last: in a bucket, Orbax takes a
                                          checkpoint without it as not finished
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import before_change, write_bytes
from flexolmo_jax.storage.paths import in_bucket, kvstore
from flexolmo_jax.storage.placing import make_read_only
from flexolmo_jax.storage.tensorfile import finite

CHUNK = 1 << 21  # the most bytes of a chunk, if its axis can be halved that often
PIECES = 16  # the fewest chunks of a shard: so many devices can each read only their own ...
SMALL = 1 << 18  # ... unless chunks would become smaller than this many bytes
COMMIT = "commit_success.txt"
SHARD = 1 << 26  # the most bytes of a shard, if its first axis can be halved that often

ShardIndex = tuple[int, ...]
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How one parameter is stored: a shard is a file, a chunk is what is read and checked at once.

    `experts/gate` of 7 experts of the paper's 7B model, in bfloat16:

        shape        [32, 7, 4096, 11008]   layers, experts, embed, ffn: 20.2 GB
        shard        [1, 1, 2048, 11008]    half a matrix: a whole one, 90 MB, is above SHARD
        files        32 x 7 x 2 = 448       c/<layer>/<expert>/<half>/0
        a file       45,089,412 bytes       45,088,768 of weights; the rest is checksums and index
        chunk        [1, 1, 64, 11008]      1.4 MB: a device that holds 1/64 of "embed" reads 1/64

    Taking an expert out leaves 64 files of this array out, and rewrites none.
    """

    shape: tuple[int, ...]
    dtype: str
    shard: tuple[int, ...]
    chunk: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: str, axes: tuple[str | None, ...]) -> "Layout":
        """The layout of a parameter: a shard for each expert and, if it has matrices, each layer.

        `axes` are its logical axes.
        """
        inside = [axis not in ("layers", "expert") for axis in axes]
        shard = [
            n if within or (axis == "layers" and sum(inside) < 2) else 1
            for n, axis, within in zip(shape, axes, inside, strict=True)
        ]
        size = math.prod(shard) * np.dtype(dtype).itemsize
        first = inside.index(True) if any(inside) else 0
        while size > SHARD and shard[first] % 2 == 0:
            shard[first], size = shard[first] // 2, size // 2
        chunk = list(shard)
        split = axes.index("embed") if "embed" in axes else first
        while chunk[split] % 2 == 0 and (
            size > CHUNK or (shard[split] // chunk[split] < PIECES and size >= 2 * SMALL)
        ):
            chunk[split], size = chunk[split] // 2, size // 2
        return cls(shape, dtype, tuple(shard), tuple(chunk))

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of shards along each axis."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.shard, strict=True))

    @property
    def shard_bytes(self) -> int:
        """The size of a shard's file: each chunk has a CRC-32C, and so has their index."""
        chunks = math.prod(self.shard) // math.prod(self.chunk)
        return math.prod(self.shard) * np.dtype(self.dtype).itemsize + 4 * chunks + 16 * chunks + 4

    def indices(self) -> Iterator[ShardIndex]:
        """The indices of all shards, in C order."""
        return itertools.product(*map(range, self.counts))

    def box(self, index: ShardIndex) -> Box:
        """The part of the array that a shard holds."""
        return tuple(
            slice(i * n, min((i + 1) * n, end))
            for i, n, end in zip(index, self.shard, self.shape, strict=True)
        )

    def whole(self) -> list[Box]:
        """One box of the whole array, for small arrays: shards may not be consecutive in it."""
        return [tuple(slice(0, n) for n in self.shape)]

    def boxes(self, **at: int) -> Iterator[Box]:
        """The shards' boxes; with `layer` or `expert`, only the parts that belong to it.

        Layer and expert are the first two axes. The boxes are consecutive in the array, except for
        router rows of several experts: those come expert by expert.
        """
        chosen = {("layer", "expert").index(name): i for name, i in at.items()}
        for index in self.indices():
            box = list(self.box(index))
            if all(box[axis].start <= i < box[axis].stop for axis, i in chosen.items()):
                for axis, i in chosen.items():
                    box[axis] = slice(i, i + 1)
                yield tuple(box)

    def metadata(self) -> dict[str, Any]:
        """The content of zarr.json."""
        checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {"chunk_shape": self.chunk, "codecs": checked, "index_codecs": checked}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.shard}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0.0,
        }


class Writer:
    """Writes the arrays of one directory. A context manager.

    Leaving it without an error waits for all writes and completes the checkpoint.
    """

    def __init__(self, directory: Path, layouts: Mapping[str, Layout]):
        self.directory, self.layouts = directory, layouts
        self._arrays: dict[str, ts.TensorStore] = {}
        self._writing: Any = None
        self._written: list[Path] = []
        self._metadata = metadata_files(layouts)
        for name, content in self._metadata.items():
            if name != COMMIT:
                write_bytes(directory / name, content)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._writing is not None and kind is None:
            self._writing.result()
            for file in self._written:
                if not in_bucket(file):
                    make_read_only(file)
        elif self._writing is not None:
            self._writing.exception()  # waits, and raises no second error
        if kind is None:
            write_bytes(self.directory / COMMIT, self._metadata[COMMIT])

    def write(self, path: str, index: ShardIndex, values: np.ndarray) -> None:
        """Waits for the shard before, then starts writing this one.

        `values` must not change until the next call or until the Writer is left.
        """
        if self._writing is not None:
            self._writing.result()
        if path not in self._arrays:
            self._arrays[path] = open_array(array_directory(self.directory, path))
        self._written.append(self.file(path, index))
        before_change("write", self._written[-1])
        array = self._arrays[path][self.layouts[path].box(index)]
        self._writing = array.write(
            values.reshape(array.shape), can_reference_source_data_indefinitely=True
        )

    def write_slice(self, path: str, prefix: ShardIndex, values: np.ndarray) -> None:
        """Writes all shards whose index starts with `prefix`, as `write` does."""
        layout = self.layouts[path]
        for rest in itertools.product(*map(range, layout.counts[len(prefix) :])):
            index = (*prefix, *rest)
            self.write(path, index, values[layout.box(index)[len(prefix) :]])

    def file(self, path: str, index: ShardIndex) -> Path:
        """The file of a shard."""
        return self.directory / shard_name(path, index)


class Reader:
    """Reads a directory of Zarr arrays that this package, in any version, or Orbax wrote."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._arrays: dict[str, ts.TensorStore] = {}

    def has(self, path: str) -> bool:
        return array_directory(self.directory, path).exists()

    def file(self, path: str, index: ShardIndex) -> Path:
        """The file of a shard, if the array has the layout that the index belongs to."""
        return self.directory / shard_name(path, index)

    def digest(self, path: str, boxes: Iterable[Box]) -> str:
        """SHA-256 of the values of consecutive parts (C order, little-endian)."""
        digest = hashlib.sha256()
        for box in boxes:
            values = np.ascontiguousarray(self.read(path, box))
            digest.update(values.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def read(self, path: str, box: Box) -> np.ndarray:
        """A part of an array. Raises UserError for damaged data."""
        with self._as_user_error(path):
            return self._array(path)[box].read().result()

    def shape_and_dtype(self, path: str) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and dtype of an array. Raises UserError if it cannot be opened."""
        array = self._array(path)
        return tuple(array.shape), array.dtype.numpy_dtype

    def chunk(self, path: str) -> tuple[int, ...]:
        """The shape of the smallest part of an array that can be read without reading more."""
        return tuple(int(n or 1) for n in self._array(path).chunk_layout.read_chunk.shape or ())

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._arrays:
            with self._as_user_error(path):
                self._arrays[path] = open_array(array_directory(self.directory, path))
        return self._arrays[path]

    @contextmanager
    def _as_user_error(self, path: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, IndexError) as error:
            raise UserError(
                f"the weights {path} in {self.directory} cannot be read:"
                f" {str(error).splitlines()[0]:.200}"
            ) from None


class Readable(Protocol):
    """What a `Stored` array is read from: a `Reader`, or a run's checkpoint."""

    def read(self, path: str, box: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Stored:
    """An array in files that is used like one in memory: indexing reads a part and casts it.

    With `expert` it is that expert's slice of the array.
    """

    reader: Readable
    path: str
    whole: tuple[int, ...]
    dtype: np.dtype
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole if self.expert is None else (self.whole[0], 1, *self.whole[2:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> "Stored":
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def __getitem__(self, index: Any) -> np.ndarray:
        """`index`: integers or slices without steps. Raises UserError as `Reader.read` does."""
        index = list(index if isinstance(index, tuple) else (index,))
        if self.expert is not None:
            one = slice(self.expert, self.expert + 1)
            is_slice = len(index) < 2 or isinstance(index[1], slice)
            index[1:2] = [one if is_slice else self.expert]
        return self.reader.read(self.path, tuple(index)).astype(self.dtype, copy=False)


def save(
    directory: Path, params: Mapping[str, Any], axes: Mapping[str, tuple[str | None, ...]]
) -> dict[str, str]:
    """Writes arrays and returns the SHA-256 of each, by path. Raises UserError, naming it, for one
    that is not finite."""
    layouts = {path: Layout.of(a.shape, str(a.dtype), axes[path]) for path, a in params.items()}
    digests = {}
    with Writer(directory, layouts) as writer:
        for path, layout in layouts.items():
            digest = hashlib.sha256()
            for index in layout.indices():
                values = np.ascontiguousarray(np.asarray(params[path][layout.box(index)]))
                finite(values, path)
                digest.update(values.reshape(-1).view(np.uint8).data)
                writer.write(path, index, values)
            digests[path] = digest.hexdigest()
    return digests


def metadata_files(layouts: Mapping[str, Layout]) -> dict[str, bytes]:
    """All files in a directory of weights except the shards: their contents by name."""
    contents = {}
    for path, layout in layouts.items():
        contents[f"{path.replace('/', '.')}/zarr.json"] = layout.metadata()
    contents |= orbax_metadata(layouts)
    files = {name: _canonical(content) for name, content in contents.items()}
    return files | {COMMIT: b"complete\n"}


def array_directory(directory: Path, path: str) -> Path:
    return directory / path.replace("/", ".")


def shard_name(path: str, index: ShardIndex) -> str:
    """The file of a shard in a directory of weights."""
    return "/".join((path.replace("/", "."), "c", *map(str, index)))


def open_array(directory: Path) -> ts.TensorStore:
    """Opens a Zarr array without a cache.

    Files are not synced one by one: whoever completes the directory syncs all of it.
    """
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(directory),
        # A shard of zeros is written too, so a missing file is an error when reading.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "recheck_cached_data": False,
    }
    return ts.open(spec, open=True, context=ts.Context({"file_io_sync": False})).result()


def orbax_metadata(layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """Orbax's own files of a checkpoint, by name. Without times: equal weights are equal files."""
    leaves = {}
    for path, layout in sorted(layouts.items()):
        keys = path.split("/")
        value = {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": layout.shape}
        leaves[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": value,
        }
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    return {
        "_METADATA": {
            "tree_metadata": leaves,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_CHECKPOINT_METADATA": {
            "item_handlers": handler,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": 0,
            "commit_timestamp_nsecs": 0,
            "custom_metadata": {},
        },
    }


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()
