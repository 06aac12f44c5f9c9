"""Loads weights onto devices, with the same reader that verifying and merging use.

Every device gets its own part of each array, and a process reads only the parts of its devices. A
part is read in pieces of a few shards, and a few pieces are read while another is placed. So the
host's memory holds a few pieces, however large the model is. All reads have ended when loading
returns or raises.
"""

import contextlib
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.weights import Box, Reader

PIECE = 1 << 25  # bytes of an array that are read at once, unless a chunk is larger
AHEAD = 6  # pieces that are read while another is placed
IN_HOST_MEMORY = ("cpu",)  # platforms whose devices have no memory of their own
ALIGNED = 64  # bytes; XLA uses host memory without a copy if it is aligned to this

Asked = TypeVar("Asked")
Read = TypeVar("Read")


class _Piece(NamedTuple):
    path: str
    part: Box  # the part of the array that these devices hold
    box: Box  # the piece of that part, also in the array's indices
    devices: tuple[Any, ...]  # jax.Devices
    last: bool  # whether it is the last piece of its part

    @property
    def place(self) -> Box:
        """The box in its part's indices."""
        return tuple(
            slice(b.start - p.start, b.stop - p.start)
            for b, p in zip(self.box, self.part, strict=True)
        )


def load(reader: Reader, target: dict[str, Any]) -> dict[str, Any]:
    """Reads parameters with the shapes, dtypes and shardings of `target`.

    `target` is a tree of ShapeDtypeStructs. Raises UserError for damaged data, and for arrays of
    another shape or dtype.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    named = {"/".join(key.key for key in keys): leaf for keys, leaf in leaves}
    for path, leaf in named.items():
        _check(reader, path, leaf)
    pieces = (piece for path, leaf in named.items() for piece in _pieces(reader, path, leaf))
    placed: dict[str, list[jax.Array]] = {path: [] for path in named}
    room: _OnHost | _OnDevices | None = None
    read = _ahead(lambda piece: reader.read(piece.path, piece.box), pieces)
    with contextlib.closing(read):
        for piece, values in read:
            room = room or _room(piece, values.dtype)
            room.put(piece.place, values)
            if piece.last:
                placed[piece.path] += room.arrays()
                room = None
    arrays = [
        jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed[path])
        for path, leaf in named.items()
    ]
    return jax.tree.unflatten(structure, arrays)


def _check(reader: Reader, path: str, leaf: jax.ShapeDtypeStruct) -> None:
    shape, dtype = reader.shape_and_dtype(path)
    if (shape, dtype) != (leaf.shape, leaf.dtype) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        expected = f"expected {leaf.dtype} {list(leaf.shape)}"
        raise UserError(
            f"the weights {path} in {reader.directory} are {dtype} {list(shape)}; {expected}; fetch"
            " them again"
        )


def _pieces(reader: Reader, path: str, leaf: jax.ShapeDtypeStruct) -> Iterator[_Piece]:
    """The pieces that this process's devices need; a part that several hold is read once."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        ends = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
        holders.setdefault(ends, []).append(device)
    for ends, devices in holders.items():
        part = tuple(slice(*pair) for pair in ends)
        boxes = list(_cut(part, reader.chunk(path), leaf.dtype.itemsize))
        for number, box in enumerate(boxes, 1):
            yield _Piece(path, part, box, tuple(devices), number == len(boxes))


def _cut(part: Box, chunk: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """Cuts a part of an array into boxes of whole chunks, of at most PIECE bytes if possible."""
    size = [s.stop - s.start for s in part]
    for axis, n in enumerate(chunk):
        excess = math.prod(size) * itemsize / PIECE
        if excess <= 1:
            break
        size[axis] = min(size[axis], max(int(size[axis] / excess) // n * n, n))
    starts = (range(s.start, s.stop, max(n, 1)) for s, n in zip(part, size, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(at, min(at + n, s.stop)) for at, n, s in zip(corner, size, part, strict=True)
        )


def _room(piece: _Piece, dtype: np.dtype) -> "_OnHost | _OnDevices":
    """Memory in which the pieces of one part are put together."""
    shape = tuple(s.stop - s.start for s in piece.part)
    on_host = piece.last or all(device.platform in IN_HOST_MEMORY for device in piece.devices)
    return (_OnHost if on_host else _OnDevices)(shape, dtype, piece.devices)


class _OnHost:
    """Host memory: for CPU devices, which then use it as it is, and for parts of one piece."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: tuple[Any, ...]):
        self._devices = devices
        size = math.prod(shape) * dtype.itemsize
        memory = np.empty(size + ALIGNED, np.uint8)
        start = -memory.ctypes.data % ALIGNED
        self._values = memory[start : start + size].view(dtype).reshape(shape)

    def put(self, place: Box, values: np.ndarray) -> None:
        self._values[place] = values

    def arrays(self) -> list[jax.Array]:
        """One array for each device. Waits for all transfers."""
        return jax.block_until_ready(
            [jax.device_put(self._values, device) for device in self._devices]
        )


class _OnDevices:
    """The devices' own memory, for parts that may be too large for the host's."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: tuple[Any, ...]):
        self._parts = [jnp.zeros(shape, dtype, device=device) for device in devices]

    def put(self, place: Box, values: np.ndarray) -> None:
        start = [s.start for s in place]
        self._parts = [
            _put_into(part, jax.device_put(values, part.sharding), start) for part in self._parts
        ]
        jax.block_until_ready(self._parts)  # after this, `values` is no longer needed

    def arrays(self) -> list[jax.Array]:
        return self._parts


@functools.partial(jax.jit, donate_argnums=0)
def _put_into(part: jax.Array, values: jax.Array, start: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(part, values, start)  # in place: the part is donated


def _ahead(
    read: Callable[[Asked], Read], asked: Iterable[Asked]
) -> Generator[tuple[Asked, Read], None, None]:
    """Yields (what was asked for, what was read), in order. Closing it waits for all reads."""
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="weights")
    waiting = deque[tuple[Asked, Future[Read]]]()
    try:
        for one in asked:
            waiting.append((one, pool.submit(read, one)))
            if len(waiting) > AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
                del future
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
