"""The files of a published embedder: embedder.json, and embedder.npz for TF-IDF.

An anchor that a stranger publishes has them too, so nothing in them may take more memory than its
size tells.
"""

import io
import json
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from flexolmo_jax.config import LARGEST
from flexolmo_jax.data.arrays import parse_header
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import write_bytes
from flexolmo_jax.storage.paths import reason
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

FORMAT = 1  # of embedder.json and embedder.npz
PROJECTION_SEED = 2507_07024  # the paper's arXiv number; part of the format, the same for everybody
VOCABULARY = 16_384
BUCKETS = 4096
ROOM = 4096  # bytes at most of embedder.npz that are not values
SIGNS = 1 << 15  # commas and brackets in embedder.json: one for each word, and words that are one


@dataclass(frozen=True)
class _Saved:
    """What embedder.json holds."""

    format: int
    projection_seed: int
    name: Annotated[str, Field(min_length=1, max_length=200)]
    version: Annotated[str, Field(max_length=1000)]
    dim: Annotated[int, Field(ge=1, le=LARGEST["d_model"])]
    words: Annotated[list[str], Field(max_length=VOCABULARY)] | None = None


def write_description(directory: Path, name: str, version: str, dim: int, **more: Any) -> None:
    """Writes embedder.json into a directory."""
    versions = {"format": FORMAT, "projection_seed": PROJECTION_SEED}
    content = versions | {"name": name, "version": version, "dim": dim} | more
    write_bytes(directory / "embedder.json", (json.dumps(content, indent=1) + "\n").encode("ascii"))


def read_description(directory: Path) -> dict[str, Any]:
    """The content of embedder.json. Raises UserError where it is missing or cannot be used."""
    path = directory / "embedder.json"
    try:
        saved = parse_json(read_bytes(path), SIGNS, 32)
        versions = isinstance(saved, dict) and (saved.get("format"), saved.get("projection_seed"))
        if versions and versions != (FORMAT, PROJECTION_SEED):
            raise UserError(
                f"{path} has (format, projection seed) {versions!r:.80}, this flexolmo-jax reads"
                f" {(FORMAT, PROJECTION_SEED)}; install the version that published the anchor"
            )
        conform(_Saved, saved)
    except FileNotFoundError:
        raise UserError(
            f"no embedder in {directory}: embedder.json is missing; expected a published anchor"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a saved embedder ({reason(error):.200}); fetch the anchor again"
        ) from None
    return saved


def write_values(directory: Path, idf: np.ndarray, signs: np.ndarray) -> None:
    """Writes embedder.npz into a directory."""
    buffer = io.BytesIO()
    # np.savez writes no times: the same arrays give the same bytes
    np.savez(buffer, idf=idf.astype("<f4"), signs=signs)
    write_bytes(directory / "embedder.npz", buffer.getvalue())


def read_values(directory: Path, words: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(idf, signs) of embedder.npz. Raises UserError where they do not fit embedder.json."""
    path = directory / "embedder.npz"
    terms, width = words + BUCKETS, -(-dim // 8)
    try:
        content = read_bytes(path, terms * (4 + width) + ROOM)
        _check_directory(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            idf = _read_stored(archive, "idf.npy", np.dtype("<f4"), (terms,))
            signs = _read_stored(archive, "signs.npy", np.dtype(np.uint8), (terms, width))
        if not np.isfinite(idf).all():
            raise ValueError("values that are not finite")
        return idf, signs
    except FileNotFoundError:
        raise UserError(f"{path} is missing beside embedder.json; fetch the anchor again") from None
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        RuntimeError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{path} is not the TF-IDF embedder of embedder.json ({reason(error):.200}); fetch"
            " the anchor again"
        ) from None


def _check_directory(archive: bytes) -> None:
    """Raises ValueError unless a zip file ends in a directory of two entries.

    zipfile takes half a kilobyte of memory for each entry, and a small file can list many.
    """
    signature, *_, entries, size, _, comment = struct.unpack("<4s4H2LH", archive[-22:].rjust(22))
    is_zip64 = archive[-42:-38] == b"PK\x06\x07"
    if (signature, entries, comment) != (b"PK\x05\x06", 2, 0) or size > ROOM or is_zip64:
        raise ValueError("no zip file of two arrays")


def _read_stored(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """An array of a zip file, stored without compression, so that it is no larger than the file."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{name} is compressed")
    content = archive.read(entry)
    header = parse_header(content[:ROOM])
    size = math.prod(shape) * dtype.itemsize
    if header is None or header[:3] != (shape, False, dtype) or len(content) != header.start + size:
        raise ValueError(f"{name} is no array of {dtype} {list(shape)}")
    return np.frombuffer(content, dtype, offset=header.start).reshape(shape)
