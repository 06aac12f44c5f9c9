"""What workers of a Ray cluster say of each shard of some documents.

    over_shards(paths, reading, on_workers("module", "function"), **how)     # inside `connected`

calls `function(batch, files, reading, **how)` there, a task a shard. `batch["shard"]` has the
numbers of the shards, and `files[number]` their files, of which `seen` makes paths.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import AS_TEXT, document_files
from flexolmo_jax.data.shards import Shard, shards_of
from flexolmo_jax.runtime.cluster import shared_path_error
from flexolmo_jax.storage.paths import in_bucket, path_of, size_of

Columns = dict[str, np.ndarray]
Files = dict[int, list[str]]  # of each shard


def over_shards(
    paths: Iterable[Path], reading: Reading, call: Callable[..., Any], **how: Any
) -> Iterator[dict[str, Any]]:
    """The rows that workers give, those of a shard in order, shards in any order."""
    shards = shards_in(paths, reading)
    found = mapped(shards, call, files=files_of(shards), reading=reading, **how)
    yield from found.iter_rows()


def shards_in(paths: Iterable[Path], reading: Reading = AS_TEXT) -> list[Shard]:
    """The shards of all documents in files and directories. Raises UserError."""
    files = [file for path in paths for file in document_files(path, reading)]
    return shards_of(files, [size_of(file) for file in files])


def mapped(shards: Sequence[Shard], call: Callable[..., Any], **how: Any) -> Any:
    """The same as Ray's dataset."""
    import ray.data

    rows = [{"shard": shard.number} for shard in shards]
    numbers = ray.data.from_items(rows, override_num_blocks=len(rows))
    return numbers.map_batches(call, batch_size=1, fn_kwargs=how)


def files_of(shards: Iterable[Shard]) -> Files:
    """The files of each shard, as every machine knows them."""
    return {shard.number: [everywhere(file) for file in shard.files] for shard in shards}


def everywhere(path: Path) -> str:
    """The path for machines that work in another directory."""
    return str(path if in_bucket(path) else path.absolute())


def seen(files: Sequence[str]) -> list[Path]:
    """The paths, on a worker. Raises UserError where it does not see one."""
    paths = [path_of(file) for file in files]
    for path in paths:
        if not path.exists():
            raise shared_path_error(path)
    return paths
